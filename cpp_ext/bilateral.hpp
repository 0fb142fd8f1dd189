// The 13x13 joint bilateral filter of blur guidance (docs/algorithm.md, 7.4): weights by distance in the plane and by
// the summed channel distance in a standardised guide; reflected edges.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.hpp"

namespace dmx {

constexpr int bilateral_reach = 6;

// exp(x) for x <= 0, within 2e-7 relative, in plain arithmetic that compilers vectorise. Underflows to about 1e-38.
DMX_HD inline float exp_of_negative(float x) {
    x = x < -87.0F ? -87.0F : x;
    const int power = static_cast<int>(x * 1.44269504F - 0.5F);
    const float n = static_cast<float>(power);
    const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln 2 in two parts
    float series = 1.0F / 720.0F;
    series = series * r + 1.0F / 120.0F;
    series = series * r + 1.0F / 24.0F;
    series = series * r + 1.0F / 6.0F;
    series = series * r + 0.5F;
    series = series * r + 1.0F;
    series = series * r + 1.0F;
    const std::uint32_t bits = static_cast<std::uint32_t>(power + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return series * scale;
}

// Both deviations are 3, so there is one denominator, 2 * 3^2.
DMX_HD inline float bilateral_weight(float guide_distance, float plane_distance2) {
    return exp_of_negative((guide_distance * guide_distance + plane_distance2) * (-1.0F / 18.0F));
}

// The index mirrored at the first and last element, which are not repeated.
DMX_HD inline int reflected(int index, int count) {
    if (count == 1) return 0;
    const int period = 2 * (count - 1);
    index = ((index % period) + period) % period;
    return index < count ? index : period - index;
}

struct Standard {
    float mean, scale;  // standardised = (value - mean) / scale
};

inline Standard standard_of(const float* values, ptrdiff_t count) {
    double sum = 0.0, squares = 0.0;
    for (ptrdiff_t i = 0; i < count; ++i) sum += values[i];
    const double mean = sum / static_cast<double>(count);
    for (ptrdiff_t i = 0; i < count; ++i) squares += (values[i] - mean) * (values[i] - mean);
    const double deviation = std::sqrt(squares / static_cast<double>(std::max<ptrdiff_t>(count - 1, 1)));
    return {static_cast<float>(mean), static_cast<float>(deviation) + 1e-5F};
}

namespace bilateral_detail {

struct Planes {
    int channels, height, width;
    int padded_width() const { return width + 2 * bilateral_reach; }
    ptrdiff_t plane() const { return ptrdiff_t{height + 2 * bilateral_reach} * padded_width(); }
};

inline std::vector<float> padded(const float* values, Planes planes, Standard standard) {
    std::vector<float> out(static_cast<size_t>(planes.channels * planes.plane()));
    float* at = out.data();
    for (int c = 0; c < planes.channels; ++c) {
        for (int y = -bilateral_reach; y < planes.height + bilateral_reach; ++y) {
            const float* row = values + (ptrdiff_t{c} * planes.height + reflected(y, planes.height)) * planes.width;
            for (int x = -bilateral_reach; x < planes.width + bilateral_reach; ++x) {
                *at++ = (row[reflected(x, planes.width)] - standard.mean) / standard.scale;
            }
        }
    }
    return out;
}

struct Scratch {
    explicit Scratch(Planes planes)
        : weights(static_cast<size_t>(planes.width)), total(weights), sums(static_cast<size_t>(planes.width) * planes.channels) {}
    std::vector<float> weights, total, sums;
};

// One row of output. `guide` and `values` point at that row of the padded planes, to the top left of its first window.
// Every loop runs along the row: each tap of the window is a shifted row, so all loops vectorise.
static DMX_CLONES void sum_windows(const float* DMX_RESTRICT guide, const float* DMX_RESTRICT values, ptrdiff_t plane,
                                   ptrdiff_t stride, ptrdiff_t channels, ptrdiff_t width, float* DMX_RESTRICT weights,
                                   float* DMX_RESTRICT total, float* DMX_RESTRICT sums) {
    constexpr int window = 2 * bilateral_reach + 1;
    const float* centre = guide + bilateral_reach * stride + bilateral_reach;
    for (ptrdiff_t x = 0; x < width; ++x) total[x] = 0.0F;
    for (ptrdiff_t x = 0; x < width * channels; ++x) sums[x] = 0.0F;
    for (int tap = 0; tap < window * window; ++tap) {
        const int dy = tap / window - bilateral_reach, dx = tap % window - bilateral_reach;
        const ptrdiff_t shift = dy * stride + dx;
        for (ptrdiff_t x = 0; x < width; ++x) weights[x] = 0.0F;
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const float* here = centre + c * plane;
            for (ptrdiff_t x = 0; x < width; ++x) weights[x] += std::fabs(here[x + shift] - here[x]);
        }
        const float plane_distance2 = static_cast<float>(dy * dy + dx * dx);
        for (ptrdiff_t x = 0; x < width; ++x) {
            const float weight = bilateral_weight(weights[x], plane_distance2);
            weights[x] = weight;
            total[x] += weight;
        }
        for (ptrdiff_t c = 0; c < channels; ++c) {
            const float* row = values + (bilateral_reach * stride + bilateral_reach) + c * plane + shift;
            float* sum = sums + c * width;
            for (ptrdiff_t x = 0; x < width; ++x) sum[x] += weights[x] * row[x];
        }
    }
}

inline void filter_rows(const float* values, const float* guide, float* out, Planes planes, ptrdiff_t begin, ptrdiff_t end) {
    const ptrdiff_t width = planes.width, stride = planes.padded_width();
    Scratch scratch(planes);
    for (ptrdiff_t y = begin; y < end; ++y) {
        sum_windows(guide + y * stride, values + y * stride, planes.plane(), stride, planes.channels, width,
                    scratch.weights.data(), scratch.total.data(), scratch.sums.data());
        for (int c = 0; c < planes.channels; ++c) {
            float* row = out + (ptrdiff_t{c} * planes.height + y) * width;
            for (ptrdiff_t x = 0; x < width; ++x) row[x] = scratch.sums[static_cast<size_t>(c * width + x)] / scratch.total[static_cast<size_t>(x)];
        }
    }
}

}  // namespace bilateral_detail

// One picture: values, guide and out are (channels, height, width).
inline void bilateral(const float* values, const float* guide, float* out, int channels, int height, int width) {
    const bilateral_detail::Planes planes{channels, height, width};
    const auto padded_values = bilateral_detail::padded(values, planes, {0.0F, 1.0F});
    const auto padded_guide = bilateral_detail::padded(guide, planes, standard_of(guide, ptrdiff_t{channels} * height * width));
    parallel_for(height, 1 + 2000 / std::max(width, 1), [&](ptrdiff_t begin, ptrdiff_t end) {
        bilateral_detail::filter_rows(padded_values.data(), padded_guide.data(), out, planes, begin, end);
    });
}

}  // namespace dmx
