// The arithmetic of one sampling step around the network (docs/algorithm.md, 7): blend and scale before it;
// blur guidance, classifier-free guidance and the solver after it. Single precision, in the reference's order.
#pragma once

#include <cmath>
#include <vector>

#include "bilateral.hpp"

namespace dmx {

// The latent inside the mask, outside it the background at the noise level of the step.
DMX_HD inline float blended(float x, float background, float mask, float noise, float sigma) {
    return x * mask + (background + sigma * noise) * (1.0F - mask);
}

DMX_HD inline float guided(float negative, float positive, float scale) { return negative + scale * (positive - negative); }

struct SolverRow {
    float x, x0, dx0, noise;  // coefficients of x_in, x0, x0 minus that of the previous step, noise
};

DMX_HD inline float solved(float x_in, float x0, float x0_before, float noise, SolverRow row) {
    return row.x * x_in + row.x0 * x0 + row.dx0 * (x0 - x0_before) + row.noise * noise;
}

// Shapes: pictures (pictures, channels, height, width), one mask plane per picture, network rows [negative, positive].
struct LatentShape {
    int pictures, channels, height, width;
    ptrdiff_t plane() const { return ptrdiff_t{height} * width; }
    ptrdiff_t picture() const { return channels * plane(); }
};

inline void blend_scale(LatentShape shape, const float* x, const float* background, const float* mask, const float* noise,
                        float sigma, float* x_in, float* network_in) {
    const float scale = std::sqrt(sigma * sigma + 1.0F);
    const ptrdiff_t plane = shape.plane();
    for (ptrdiff_t n = 0; n < shape.pictures; ++n) {
        for (ptrdiff_t c = 0; c < shape.channels; ++c) {
            const ptrdiff_t at = (n * shape.channels + c) * plane;
            float* negative = network_in + n * shape.picture() + at;  // earlier pictures have two rows each
            for (ptrdiff_t i = 0; i < plane; ++i) {
                x_in[at + i] = blended(x[at + i], background[at + i], mask[n * plane + i], noise[at + i], sigma);
                negative[i] = x_in[at + i] / scale;
            }
            std::copy_n(negative, plane, negative + shape.picture());
        }
    }
}

struct Guidance {
    float sigma, scale, blur_alpha, rescale;
    int rows_per_picture;  // 2: [negative, positive]; 1: positive only, no classifier-free guidance
};

namespace step_detail {

// e = x - (x - sigma * eps), rounded where the reference rounds, since that passes x0, not eps, between its parts.
inline void scaled_noise(const float* x_in, const float* eps, float sigma, std::vector<float>& x0, std::vector<float>& e) {
    for (size_t i = 0; i < e.size(); ++i) {
        x0[i] = x_in[i] - sigma * eps[i];
        e[i] = x_in[i] - x0[i];
    }
}

inline void blur(const float* x_in, LatentShape shape, float alpha, const std::vector<float>& x0, std::vector<float>& e) {
    std::vector<float> smooth(e.size());
    bilateral(e.data(), x0.data(), smooth.data(), shape.channels, shape.height, shape.width);
    for (size_t i = 0; i < e.size(); ++i) {
        const float sharpened = x_in[i] - (alpha * smooth[i] + (1.0F - alpha) * e[i]);
        e[i] = x_in[i] - sharpened;
    }
}

// Scales the guided noise to the spread of the positive row (Lin et al. 2305.08891, section 3.4), by a share.
inline void rescale(const std::vector<float>& positive, std::vector<float>& e, float share) {
    const auto count = static_cast<ptrdiff_t>(e.size());
    const float spread = standard_of(e.data(), count).scale - 1e-5F;
    if (!(spread > 0.0F)) return;
    const float ratio = (standard_of(positive.data(), count).scale - 1e-5F) / spread;
    for (float& value : e) value = share * (value * ratio) + (1.0F - share) * value;
}

}  // namespace step_detail

// x0_before may be null when the solver has no history (then row.dx0 is 0).
inline void guided_step(LatentShape shape, const float* x_in, const float* eps, const float* x0_before, const float* noise,
                        Guidance guidance, SolverRow row, float* x_out, float* x0_out) {
    const ptrdiff_t size = shape.picture();
    std::vector<float> x0(static_cast<size_t>(size)), positive(x0), negative(x0), e(x0);
    for (int n = 0; n < shape.pictures; ++n) {
        const float* x = x_in + n * size;
        const float* rows = eps + n * size * guidance.rows_per_picture;
        step_detail::scaled_noise(x, rows + (guidance.rows_per_picture - 1) * size, guidance.sigma, x0, positive);
        if (guidance.blur_alpha > 0.0F) step_detail::blur(x, shape, guidance.blur_alpha, x0, positive);
        e = positive;
        if (guidance.rows_per_picture == 2) {
            step_detail::scaled_noise(x, rows, guidance.sigma, x0, negative);
            for (size_t i = 0; i < e.size(); ++i) e[i] = guided(negative[i], positive[i], guidance.scale);
            if (guidance.rescale > 0.0F) step_detail::rescale(positive, e, guidance.rescale);
        }
        for (ptrdiff_t i = 0; i < size; ++i) {
            const ptrdiff_t at = n * size + i;
            const float value = x[i] - e[static_cast<size_t>(i)];
            x0_out[at] = value;
            x_out[at] = solved(x[i], value, x0_before != nullptr ? x0_before[at] : value, noise[at], row);
        }
    }
}

}  // namespace dmx
