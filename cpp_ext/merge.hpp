// A subject merged into the weight of a layer: W + A (s B), in float32, rounded once. core/merging.py describes it.
//
// The products are summed in the order of the ranks and by themselves, and the sum is added to the weight once: it is far
// smaller than the weight, whose last bits would swallow the parts of it. Without contraction to fused multiply-adds
// this has the same bits on host and device, and in numpy.
#pragma once

#include "gpu/group.hpp"
#include "parallel.hpp"

namespace dmx {

// What A and B add to the weight of input i and output j.
// a: A's row i, `rank` numbers. b: the first number of B's column j, whose numbers are `stride` apart. scale: of B.
template <class T>
DMX_HD inline float change_of(const T* a, const T* b, ptrdiff_t stride, int rank, float scale) {
    float sum = 0.0F;
    for (int r = 0; r < rank; ++r) sum = sum + float_of(a[r]) * (float_of(b[r * stride]) * scale);
    return sum;
}

DMX_HD inline float merged(float weight, float change) { return weight + change; }

DMX_HD inline void put(float value, float* at) { *at = value; }
DMX_HD inline void put(float value, Half* at) { *at = half_of(value); }

// Rows [begin, end) of out = weight + left right, where W is stored as (rows, columns), each row `stride` numbers after
// the one before. left: (rows, rank), right: (rank, columns), scaled: A and B, or B^T and A^T for a W that is stored
// transposed.
template <class T>
DMX_CLONES void merge_rows(const T* DMX_RESTRICT weight, T* DMX_RESTRICT out, ptrdiff_t stride, ptrdiff_t columns,
                           const float* DMX_RESTRICT left, const float* DMX_RESTRICT right, int rank, ptrdiff_t begin,
                           ptrdiff_t end) {
    constexpr ptrdiff_t width = 64;  // sums that fit into registers
    for (ptrdiff_t i = begin; i < end; ++i) {
        for (ptrdiff_t first = 0; first < columns; first += width) {
            const ptrdiff_t count = columns - first < width ? columns - first : width;
            float sums[width] = {};
            for (int r = 0; r < rank; ++r) {
                const float factor = left[i * rank + r];
                const float* DMX_RESTRICT row = right + r * columns + first;
                if (count == width) {
                    for (ptrdiff_t j = 0; j < width; ++j) sums[j] = sums[j] + factor * row[j];
                } else {
                    for (ptrdiff_t j = 0; j < count; ++j) sums[j] = sums[j] + factor * row[j];
                }
            }
            const ptrdiff_t at = i * stride + first;
            for (ptrdiff_t j = 0; j < count; ++j) put(merged(float_of(weight[at + j]), sums[j]), out + at + j);
        }
    }
}

template <class T>
void merge_weight(const T* weight, T* out, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, const float* left,
                  const float* right, int rank) {
    const ptrdiff_t grain = 65536 / (columns + 1) + 1;
    parallel_for(rows, grain, [&](ptrdiff_t begin, ptrdiff_t end) {
        merge_rows(weight, out, stride, columns, left, right, rank, begin, end);
    });
}

}  // namespace dmx
