// Pastes content into a picture, then composes it with the original by the feather (docs/algorithm.md, 9.2).
// Single precision, in the reference's order of operations, truncated to 8 bit: equal to the reference byte for byte.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.hpp"

namespace dmx {

struct Box {
    int row0, row1, col0, col1;
};

DMX_HD inline std::uint8_t mixed(std::uint8_t top, std::uint8_t bottom, float share) {
    const float value = static_cast<float>(top) * share + static_cast<float>(bottom) * (1.0F - share);
    return byte_of(static_cast<int>(value));
}

namespace paste_detail {

// `shares` has one entry per pixel; a pixel has three bytes.
static DMX_CLONES void mix_row(const std::uint8_t* DMX_RESTRICT top, const std::uint8_t* DMX_RESTRICT bottom,
                               const float* DMX_RESTRICT shares, std::uint8_t* DMX_RESTRICT out, ptrdiff_t pixels) {
    for (ptrdiff_t i = 0; i < pixels; ++i) {
        for (int c = 0; c < 3; ++c) out[3 * i + c] = mixed(top[3 * i + c], bottom[3 * i + c], shares[i]);
    }
}

static DMX_CLONES void shares_of(const std::uint8_t* DMX_RESTRICT weight, float* DMX_RESTRICT shares, ptrdiff_t pixels) {
    for (ptrdiff_t i = 0; i < pixels; ++i) shares[i] = static_cast<float>(weight[i]) / 255.0F;
}

}  // namespace paste_detail

// alpha (null, or one share per content pixel) softens the content before the feather.
inline void paste(const std::uint8_t* original, const std::uint8_t* content, Box box, const std::uint8_t* weight,
                  const float* alpha, std::uint8_t* out, int height, int width) {
    const int content_width = box.col1 - box.col0;
    parallel_for(height, 1 + 100000 / std::max(width, 1), [&](ptrdiff_t begin, ptrdiff_t end) {
        std::vector<std::uint8_t> pasted(static_cast<size_t>(width) * 3), softened(static_cast<size_t>(width) * 3);
        std::vector<float> shares(static_cast<size_t>(width));
        for (ptrdiff_t y = begin; y < end; ++y) {
            const std::uint8_t* below = original + y * width * 3;
            std::memcpy(pasted.data(), below, pasted.size());
            if (y >= box.row0 && y < box.row1 && content_width > 0) {
                const ptrdiff_t start = (y - box.row0) * content_width, column = ptrdiff_t{3} * box.col0;
                const std::uint8_t* line = content + start * 3;
                if (alpha != nullptr) {
                    paste_detail::mix_row(line, below + column, alpha + start, softened.data(), content_width);
                    line = softened.data();
                }
                std::memcpy(pasted.data() + column, line, static_cast<size_t>(content_width) * 3);
            }
            paste_detail::shares_of(weight + y * width, shares.data(), width);
            paste_detail::mix_row(pasted.data(), below, shares.data(), out + y * width * 3, width);
        }
    });
}

// From 0.1 at the rim to 1 at the centre: alpha = 0.1 + 0.9 G/max G, G a Gaussian of a quarter of the short side.
// A GPU's exp may differ in the last of 53 bits, which single precision hides.
DMX_HD inline float soft_share(int y, int x, int height, int width) {
    const double deviation = (height < width ? height : width) / 4.0;
    const double dy = y - height / 2, dx = x - width / 2;  // G is 1 at the centre, which is always a pixel
    const double gauss = std::exp(-(dy * dy + dx * dx) / (2.0 * deviation * deviation));
    return 0.1F + 0.9F * static_cast<float>(gauss);
}

inline void soft_alpha(float* out, int height, int width) {
    for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x) *out++ = soft_share(y, x, height, width);
    }
}

}  // namespace dmx
