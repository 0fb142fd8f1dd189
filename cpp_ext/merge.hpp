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

// sums[j] += left[r] right[r, j] for all r in order, j < count; the rows of `right` are `stride` numbers apart. Four ranks
// at a time: each sum is then loaded and stored a quarter as often.
[[maybe_unused]] static DMX_CLONES void add_products(float* DMX_RESTRICT sums, const float* DMX_RESTRICT left,
                                                     const float* DMX_RESTRICT right, ptrdiff_t stride, int rank,
                                                     ptrdiff_t count) {
    int r = 0;
    for (; r + 4 <= rank; r += 4) {
        const float a = left[r], b = left[r + 1], c = left[r + 2], d = left[r + 3];
        const float *row = right + r * stride, *next = row + stride, *third = next + stride, *last = third + stride;
        for (ptrdiff_t j = 0; j < count; ++j) {
            sums[j] = (((sums[j] + a * row[j]) + b * next[j]) + c * third[j]) + d * last[j];
        }
    }
    for (; r < rank; ++r) {
        const float a = left[r], *row = right + r * stride;
        for (ptrdiff_t j = 0; j < count; ++j) sums[j] = sums[j] + a * row[j];
    }
}

// Rows [begin, end) of out = weight + left right, where W is stored as (rows, columns), each row `stride` numbers after
// the one before. left: (rows, rank), right: (rank, columns), scaled: A and B, or B^T and A^T for a W that is stored
// transposed.
template <class T>
void merge_rows(const T* DMX_RESTRICT weight, T* DMX_RESTRICT out, ptrdiff_t stride, ptrdiff_t columns, const float* left,
                const float* right, int rank, ptrdiff_t begin, ptrdiff_t end) {
    constexpr ptrdiff_t width = 128;  // of a block of `right` that stays in the nearest cache
    for (ptrdiff_t first = 0; first < columns; first += width) {
        const ptrdiff_t count = columns - first < width ? columns - first : width;
        for (ptrdiff_t i = begin; i < end; ++i) {
            float sums[width] = {};
            add_products(sums, left + i * rank, right + first, columns, rank, count);
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
