// Resampling of 8-bit pictures, bit-equal to Pillow's Image.resize: separable, horizontal pass first, each pass with
// weights normalised in double, rounded to 22 fractional bits, summed in integers and rounded to 8 bit.
//
// Both passes use the same loop over rows, which vectorises along the row. The horizontal pass runs on transposed
// blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.hpp"

namespace dmx {

enum class Filter { bilinear, bicubic, lanczos };

constexpr int resize_bits = 32 - 8 - 2;  // room for eight bits of picture and two of overshoot

DMX_HD inline double filter_reach(Filter filter) {
    return filter == Filter::lanczos ? 3.0 : filter == Filter::bicubic ? 2.0 : 1.0;
}

DMX_HD inline double sinc(double x) {
    if (x == 0.0) return 1.0;
    const double angle = x * 3.14159265358979323846;
    return std::sin(angle) / angle;
}

DMX_HD inline double filter_value(Filter filter, double x) {
    if (filter == Filter::lanczos) return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
    x = std::fabs(x);
    if (filter == Filter::bilinear) return x < 1.0 ? 1.0 - x : 0.0;
    constexpr double a = -0.5;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

DMX_HD inline std::uint8_t resize_value(int sum) { return byte_of(sum >> resize_bits); }

// The weights of one axis: output i is the sum of weights[i * most + k] * input[first[i] + k], k < count[i].
struct Taps {
    int outputs = 0;
    int most = 0;
    std::vector<int> first, count;
    std::vector<int> weights;
};

inline Taps resize_taps(int inputs, int outputs, Filter filter) {
    const double scale = static_cast<double>(inputs) / outputs, stretch = std::max(scale, 1.0);
    const double support = filter_reach(filter) * stretch, shrink = 1.0 / stretch;
    Taps taps;
    taps.outputs = outputs;
    taps.most = static_cast<int>(std::ceil(support)) * 2 + 1;
    taps.weights.assign(static_cast<size_t>(outputs) * static_cast<size_t>(taps.most), 0);
    std::vector<double> values(static_cast<size_t>(taps.most));
    for (int i = 0; i < outputs; ++i) {
        const double centre = (i + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(centre - support + 0.5));
        const int count = std::min(inputs, static_cast<int>(centre + support + 0.5)) - first;
        double total = 0.0;
        for (int k = 0; k < count; ++k) {
            values[static_cast<size_t>(k)] = filter_value(filter, (k + first - centre + 0.5) * shrink);
            total += values[static_cast<size_t>(k)];
        }
        int* weights = taps.weights.data() + static_cast<ptrdiff_t>(i) * taps.most;
        for (int k = 0; k < count; ++k) {
            const double weight = total != 0.0 ? values[static_cast<size_t>(k)] / total : values[static_cast<size_t>(k)];
            weights[k] = static_cast<int>((weight < 0.0 ? -0.5 : 0.5) + weight * (1 << resize_bits));
        }
        taps.first.push_back(first);
        taps.count.push_back(count);
    }
    return taps;
}

namespace resize_detail {

static DMX_CLONES void start_sum(int* DMX_RESTRICT sum, ptrdiff_t length) {
    for (ptrdiff_t x = 0; x < length; ++x) sum[x] = 1 << (resize_bits - 1);
}

static DMX_CLONES void add_row(int* DMX_RESTRICT sum, const std::uint8_t* DMX_RESTRICT row, int weight, ptrdiff_t length) {
    for (ptrdiff_t x = 0; x < length; ++x) sum[x] += row[x] * weight;
}

static DMX_CLONES void round_row(const int* DMX_RESTRICT sum, std::uint8_t* DMX_RESTRICT out, ptrdiff_t length) {
    for (ptrdiff_t x = 0; x < length; ++x) out[x] = resize_value(sum[x]);
}

// Output row i of a picture whose rows are `stride` bytes apart, for `length` bytes of the row.
inline void resample_row(const std::uint8_t* in, ptrdiff_t stride, const Taps& taps, int i, int* sum, std::uint8_t* out,
                         ptrdiff_t length) {
    const int* weights = taps.weights.data() + static_cast<ptrdiff_t>(i) * taps.most;
    const std::uint8_t* row = in + taps.first[static_cast<size_t>(i)] * stride;
    start_sum(sum, length);
    for (int k = 0; k < taps.count[static_cast<size_t>(i)]; ++k) add_row(sum, row + k * stride, weights[k], length);
    round_row(sum, out, length);
}

// out[c * out_stride + r * out_step .. +cell) = in[r * in_stride + c * in_step .. +cell): rows become columns.
template <int cell>
void transpose_cells(const std::uint8_t* in, ptrdiff_t in_stride, std::uint8_t* out, ptrdiff_t out_stride, ptrdiff_t rows,
                     ptrdiff_t columns) {
    constexpr ptrdiff_t tile = 16;
    for (ptrdiff_t c0 = 0; c0 < columns; c0 += tile) {
        const ptrdiff_t c1 = std::min(c0 + tile, columns);
        for (ptrdiff_t r = 0; r < rows; ++r) {
            for (ptrdiff_t c = c0; c < c1; ++c) {
                for (int b = 0; b < cell; ++b) out[c * out_stride + r * cell + b] = in[r * in_stride + c * cell + b];
            }
        }
    }
}

inline void transpose(const std::uint8_t* in, ptrdiff_t in_stride, std::uint8_t* out, ptrdiff_t out_stride, ptrdiff_t rows,
                      ptrdiff_t columns, int cell) {
    switch (cell) {
        case 1: return transpose_cells<1>(in, in_stride, out, out_stride, rows, columns);
        case 2: return transpose_cells<2>(in, in_stride, out, out_stride, rows, columns);
        case 3: return transpose_cells<3>(in, in_stride, out, out_stride, rows, columns);
        default: return transpose_cells<4>(in, in_stride, out, out_stride, rows, columns);
    }
}

}  // namespace resize_detail

// A picture of 1 to 4 channels; rows are `stride` bytes apart, so a crop needs no copy.
struct PictureView {
    const std::uint8_t* data;
    ptrdiff_t stride;
    int height, width, channels;
};

// Rows [0, height) of `in` become rows of `out` (height, taps.outputs, channels).
inline void resize_horizontally(PictureView in, const Taps& taps, std::uint8_t* out) {
    constexpr int block = 64;  // rows per block: long enough to vectorise, short enough to stay in cache
    const ptrdiff_t cell = in.channels, out_stride = taps.outputs * cell;
    const ptrdiff_t blocks = (in.height + block - 1) / block;
    parallel_for(blocks, 1, [&](ptrdiff_t begin, ptrdiff_t end) {
        const ptrdiff_t line = block * cell;
        std::vector<std::uint8_t> columns(static_cast<size_t>(line * in.width)), resized(static_cast<size_t>(line * taps.outputs));
        std::vector<int> sum(static_cast<size_t>(line));
        for (ptrdiff_t b = begin; b < end; ++b) {
            const ptrdiff_t rows = std::min<ptrdiff_t>(block, in.height - b * block);
            resize_detail::transpose(in.data + b * block * in.stride, in.stride, columns.data(), line, rows, in.width, in.channels);
            for (int x = 0; x < taps.outputs; ++x) {
                resize_detail::resample_row(columns.data(), line, taps, x, sum.data(), resized.data() + x * line, rows * cell);
            }
            resize_detail::transpose(resized.data(), line, out + b * block * out_stride, out_stride, taps.outputs, rows, in.channels);
        }
    });
}

inline void resize_vertically(PictureView in, const Taps& taps, std::uint8_t* out) {
    const ptrdiff_t length = ptrdiff_t{in.width} * in.channels;
    parallel_for(taps.outputs, 1 + 50000 / length, [&](ptrdiff_t begin, ptrdiff_t end) {
        std::vector<int> sum(static_cast<size_t>(length));
        for (ptrdiff_t y = begin; y < end; ++y) {
            resize_detail::resample_row(in.data, in.stride, taps, static_cast<int>(y), sum.data(), out + y * length, length);
        }
    });
}

// Pillow 13 starts with the vertical pass when the height shrinks much more than the width (older versions never do).
DMX_HD inline bool vertically_first(int height, int width, int out_height, int out_width) {
    return out_height < height && height - out_height > 2 * (width - out_width);
}

// Skips a pass that would not change the size, as Pillow does.
inline void resize(PictureView in, int out_height, int out_width, Filter filter, std::uint8_t* out) {
    const bool across = in.width != out_width, down = in.height != out_height;
    const ptrdiff_t cell = in.channels;
    if (!across && !down) {
        for (int y = 0; y < in.height; ++y) std::copy_n(in.data + y * in.stride, in.width * cell, out + y * in.width * cell);
    } else if (!down) {
        resize_horizontally(in, resize_taps(in.width, out_width, filter), out);
    } else if (!across) {
        resize_vertically(in, resize_taps(in.height, out_height, filter), out);
    } else {
        const Taps columns = resize_taps(in.width, out_width, filter), rows = resize_taps(in.height, out_height, filter);
        if (vertically_first(in.height, in.width, out_height, out_width)) {
            std::vector<std::uint8_t> between(static_cast<size_t>(in.width * cell * out_height));
            resize_vertically(in, rows, between.data());
            resize_horizontally({between.data(), in.width * cell, out_height, in.width, in.channels}, columns, out);
        } else {
            std::vector<std::uint8_t> between(static_cast<size_t>(out_width * cell * in.height));
            resize_horizontally(in, columns, between.data());
            resize_vertically({between.data(), out_width * cell, in.height, out_width, in.channels}, rows, out);
        }
    }
}

}  // namespace dmx
