// The soft edge of a paste: 255 on the mask, falling in equal steps with the Chebyshev distance from it, 0 from
// `width` pixels on. At width 32 this is the reference's 32-fold dilation by 8 (docs/algorithm.md, 9.1).
#pragma once

#include <algorithm>
#include <vector>

#include "common.hpp"

namespace dmx {

DMX_HD inline std::uint8_t feather_value(int distance, int width) {
    return byte_of(static_cast<int>((std::int64_t{256} * (width - distance)) / width));
}

namespace feather_detail {

// distance = min(distance, 1 + least of the three neighbours in the previous row); rows have a margin of one cell.
static DMX_CLONES void step_from_row(std::uint16_t* DMX_RESTRICT row, const std::uint16_t* DMX_RESTRICT before,
                                     ptrdiff_t width) {
    for (ptrdiff_t x = 0; x < width; ++x) {
        const std::uint16_t sides = std::min(before[x - 1], before[x + 1]);
        row[x] = std::min<std::uint16_t>(row[x], static_cast<std::uint16_t>(std::min(before[x], sides) + 1));
    }
}

inline void step_along(std::uint16_t* row, ptrdiff_t start, ptrdiff_t stop, ptrdiff_t direction) {
    for (ptrdiff_t x = start; x != stop; x += direction) {
        row[x] = std::min<std::uint16_t>(row[x], static_cast<std::uint16_t>(row[x - direction] + 1));
    }
}

static DMX_CLONES void start_row(std::uint16_t* DMX_RESTRICT row, const std::uint8_t* DMX_RESTRICT mask, ptrdiff_t width,
                                 std::uint16_t far) {
    for (ptrdiff_t x = 0; x < width; ++x) row[x] = mask[x] > 127 ? std::uint16_t{0} : far;
}

}  // namespace feather_detail

// Two raster passes with unit steps to all eight neighbours give the exact Chebyshev distance.
inline void feather(const std::uint8_t* mask, std::uint8_t* out, int height, int width, int feather_width) {
    const auto far = static_cast<std::uint16_t>(feather_width);
    const ptrdiff_t stride = ptrdiff_t{width} + 2;
    std::vector<std::uint16_t> field(static_cast<size_t>(stride * (ptrdiff_t{height} + 2)), far);
    const auto row = [&](int y) { return field.data() + (y + 1) * stride + 1; };
    for (int y = 0; y < height; ++y) {
        feather_detail::start_row(row(y), mask + ptrdiff_t{y} * width, width, far);
        feather_detail::step_from_row(row(y), row(y - 1), width);
        feather_detail::step_along(row(y), 0, width, 1);
    }
    std::vector<std::uint8_t> values(static_cast<size_t>(feather_width) + 1);
    for (int d = 0; d <= feather_width; ++d) values[static_cast<size_t>(d)] = feather_value(d, feather_width);
    for (int y = height - 1; y >= 0; --y) {
        feather_detail::step_from_row(row(y), row(y + 1), width);
        feather_detail::step_along(row(y), width - 1, -1, -1);
        for (int x = 0; x < width; ++x) out[ptrdiff_t{y} * width + x] = values[row(y)[x]];
    }
}

}  // namespace dmx
