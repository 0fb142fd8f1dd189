// Attribute removal (TAS, DreamMix eq. 9 as the reference code reads it): removes from each chosen prompt token its
// part along an unwanted token, one unwanted token after the other.
#pragma once

#include "common.hpp"

namespace dmx {

DMX_HD inline double dot(const float* a, const float* b, ptrdiff_t count) {
    double sum = 0.0;
    for (ptrdiff_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
}

// token -= (token . direction) / |direction|^2 * direction; a direction of length 0 removes nothing.
DMX_HD inline void remove_along(float* token, const float* direction, ptrdiff_t count) {
    const double length2 = dot(direction, direction, count);
    if (!(length2 > 0.0)) return;
    const double share = dot(token, direction, count) / length2;
    for (ptrdiff_t i = 0; i < count; ++i) token[i] = static_cast<float>(token[i] - share * direction[i]);
}

}  // namespace dmx
