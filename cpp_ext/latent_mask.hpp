// A latent cell belongs to the hole when any pixel of its block does (docs/algorithm.md, 4.2).
#pragma once

#include <algorithm>
#include <vector>

#include "common.hpp"

namespace dmx {

namespace latent_mask_detail {

static DMX_CLONES void merge_row(std::uint8_t* DMX_RESTRICT most, const std::uint8_t* DMX_RESTRICT row, ptrdiff_t width) {
    for (ptrdiff_t x = 0; x < width; ++x) most[x] = std::max(most[x], row[x]);
}

}  // namespace latent_mask_detail

inline void latent_mask(const std::uint8_t* mask, float* out, int height, int width, int factor) {
    std::vector<std::uint8_t> most(static_cast<size_t>(width));
    for (int v = 0; v < height / factor; ++v) {
        std::fill(most.begin(), most.end(), std::uint8_t{0});
        for (int y = v * factor; y < (v + 1) * factor; ++y) {
            latent_mask_detail::merge_row(most.data(), mask + ptrdiff_t{y} * width, width);
        }
        for (int u = 0; u < width / factor; ++u) {
            const auto block = most.begin() + ptrdiff_t{u} * factor;
            *out++ = *std::max_element(block, block + factor) >= 128 ? 1.0F : 0.0F;
        }
    }
}

}  // namespace dmx
