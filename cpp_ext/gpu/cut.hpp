// Crop and resize in one launch: the intermediate picture between the two passes never leaves shared memory.
//
// A block makes tiles of the result. The first pass makes the rows (or columns) of the intermediate picture that the
// tile's second pass reads. If they are too many for shared memory, they are made and added up in parts. The sums are
// of integers, so the result is the same. An axis that keeps its size is resampled with the single weight 1, which
// changes nothing.
#pragma once

#include "../resize.hpp"
#include "block.hpp"
#include "tiles.hpp"

namespace dmx::gpu {

// Output i is the sum of weights[i * most + k] * input[first[i] + k], k < count[i]; with null it is input[i].
struct Axis {
    const std::int32_t *first_of, *count_of, *weights;
    int most;

    DMX_HD static Axis of(const std::int32_t* tables, int at, int most, int outputs) {
        if (at < 0) return {nullptr, nullptr, nullptr, 0};
        const std::int32_t* table = tables + at;
        return {table, table + outputs, table + 2 * ptrdiff_t{outputs}, most};
    }
    DMX_HD int first(int i) const { return first_of != nullptr ? first_of[i] : i; }
    DMX_HD int count(int i) const { return first_of != nullptr ? count_of[i] : 1; }
    DMX_HD int weight(int i, int k) const {
        return first_of != nullptr ? weights[ptrdiff_t{i} * most + k] : 1 << resize_bits;
    }
};

template <int channels>
struct CutKernel {
    CutArgs args;

    // A tile is long along the axis of the second pass, where the inputs of neighbours overlap.
    static constexpr int tile_late = 32, tile_early = 16;
    static constexpr int sums_size = tile_late * tile_early * channels * static_cast<int>(sizeof(int));
    static constexpr int between_size = 16384;
    static constexpr std::size_t shared = sums_size + between_size;
    static_assert(between_size >= tile_early * channels && between_size >= block_threads);

    struct TileBox {
        int y0, y1, x0, x1;
        DMX_HD int width() const { return x1 - x0; }
        DMX_HD int pixels() const { return (y1 - y0) * (x1 - x0); }
    };

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Cut cut = *args.cut;
        const bool down_first = cut.vertically_first != 0;
        const int tile_height = down_first ? tile_early : tile_late, tile_width = down_first ? tile_late : tile_early;
        const int across = parts_of(cut.out_width, tile_width), tiles = across * parts_of(cut.out_height, tile_height);
        bool found = false;
        for (int tile = group.block; tile < tiles; tile += group.blocks) {
            const int y0 = tile / across * tile_height, x0 = tile % across * tile_width;
            const TileBox box{y0, lesser(y0 + tile_height, cut.out_height), x0, lesser(x0 + tile_width, cut.out_width)};
            sum_up(group, cut, box, down_first);
            found |= put_out(group, cut, box);
        }
        if (args.found != nullptr) tell(group, found);
    }

  private:
    // A thread sums and writes the same pixels of each tile, so the sums need no sync.
    template <class Group>
    DMX_HD void sum_up(const Group& group, const Cut& cut, TileBox box, bool down_first) const {
        int* const sums = reinterpret_cast<int*>(group.shared);
        std::uint8_t* const between = group.shared + sums_size;
        const Axis rows = Axis::of(args.tables, cut.rows_at, cut.rows_most, cut.out_height);
        const Axis cols = Axis::of(args.tables, cut.cols_at, cut.cols_most, cut.out_width);
        const Axis early = down_first ? rows : cols, late = down_first ? cols : rows;
        const int early0 = down_first ? box.y0 : box.x0, early1 = down_first ? box.y1 : box.x1;
        const int late0 = down_first ? box.x0 : box.y0, late1 = down_first ? box.x1 : box.y1;
        const int stop = late.first(late1 - 1) + late.count(late1 - 1);
        const int most = between_size / ((early1 - early0) * channels);
        for (int i = group.thread; i < box.pixels(); i += group.threads) {
            for (int c = 0; c < channels; ++c) sums[i * channels + c] = 1 << (resize_bits - 1);
        }
        for (int start = late.first(late0); start < stop; start += most) {
            const int part = lesser(most, stop - start);
            // The intermediate picture has rows of the source (made along rows), or of the result (made down columns).
            const int between_height = down_first ? early1 - early0 : part;
            const int between_width = down_first ? part : early1 - early0;
            for (int i = group.thread; i < between_height * between_width; i += group.threads) {
                const int y = i / between_width, x = i % between_width;
                make_between(cut, early, early0 + (down_first ? y : x), start + (down_first ? x : y), down_first,
                             between + i * channels);
            }
            group.sync();
            for (int i = group.thread; i < box.pixels(); i += group.threads) {
                const int y = i / box.width(), x = i % box.width();
                const int output = late0 + (down_first ? x : y), across = down_first ? y : x;
                const int step = channels * (down_first ? 1 : between_width);
                const int lane = channels * (down_first ? across * between_width : across);
                add_late(late, output, start, part, between + lane, step, sums + i * channels);
            }
            group.sync();  // before `between` is overwritten, for this tile or the next
        }
    }

    // One pixel of the intermediate picture: output `output` of the early axis at input `at` of the late axis.
    DMX_HD void make_between(const Cut& cut, const Axis& axis, int output, int at, bool down_first,
                             std::uint8_t* to) const {
        const ptrdiff_t stride = ptrdiff_t{channels} * cut.width;
        const int first = axis.first(output), count = axis.count(output);
        const int row = cut.row0 + (down_first ? first : at), col = cut.col0 + (down_first ? at : first);
        const ptrdiff_t step = down_first ? stride : channels;
        const std::uint8_t* from = args.source + row * stride + ptrdiff_t{channels} * col;
        int sum[channels];
        for (int c = 0; c < channels; ++c) sum[c] = 1 << (resize_bits - 1);
        for (int k = 0; k < count; ++k, from += step) {
            const int weight = axis.weight(output, k);
            for (int c = 0; c < channels; ++c) sum[c] += from[c] * weight;
        }
        for (int c = 0; c < channels; ++c) to[c] = resize_value(sum[c]);
    }

    // Adds the inputs [start, start + part) of one output; `from` points at input `start`.
    DMX_HD static void add_late(const Axis& axis, int output, int start, int part, const std::uint8_t* from, int step,
                                int* sums) {
        const int first = axis.first(output) - start;  // within the part
        const int begin = greater(0, -first), end = lesser(axis.count(output), part - first);
        int sum[channels];
        for (int c = 0; c < channels; ++c) sum[c] = sums[c];
        for (int k = begin; k < end; ++k) {
            const int weight = axis.weight(output, k);
            for (int c = 0; c < channels; ++c) sum[c] += from[(first + k) * step + c] * weight;
        }
        for (int c = 0; c < channels; ++c) sums[c] = sum[c];
    }

    template <class Group>
    DMX_HD bool put_out(const Group& group, const Cut& cut, TileBox box) const {
        const int* const sums = reinterpret_cast<const int*>(group.shared);
        const ptrdiff_t plane = ptrdiff_t{cut.out_height} * cut.out_width;
        bool found = false;
        for (int i = group.thread; i < box.pixels(); i += group.threads) {
            const int y = box.y0 + i / box.width(), x = box.x0 + i % box.width();
            const ptrdiff_t pixel = ptrdiff_t{y} * cut.out_width + x;
            const std::uint8_t hidden = args.masked != nullptr ? args.mask[pixel] : std::uint8_t{0};
            for (int c = 0; c < channels; ++c) {
                std::uint8_t byte = resize_value(sums[i * channels + c]);
                if (args.threshold != 0) byte = byte > 127 ? 255 : 0;
                found |= byte > 127;
                if (args.out != nullptr) args.out[pixel * channels + c] = byte;
                const float value = latent_range(byte);
                if (args.network != nullptr) Values{args.network, args.half}.put(c * plane + pixel, value);
                if (args.masked != nullptr) {
                    Values{args.masked, args.half}.put(c * plane + pixel, unless_hidden(value, hidden));
                }
            }
        }
        return found;
    }

    // One write for the block.
    template <class Group>
    DMX_HD void tell(const Group& group, bool found) const {
        std::uint8_t* const all = group.shared + sums_size;  // no thread reads `between` any more
        all[group.thread] = found ? 1 : 0;
        group.sync();
        if (group.thread != 0) return;
        std::uint8_t any = 0;
        for (int i = 0; i < group.threads; ++i) any = static_cast<std::uint8_t>(any | all[i]);
        if (any != 0) group.set_bits(args.found, 1);
    }
};

// Input pixel i falls into output floor(i * outputs / inputs); each output checks the inputs that fall into it.
struct Speck {
    SpeckArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        if (*args.found != 0) return;
        const Cut cut = *args.cut;
        const int height = cut.row1 - cut.row0, width = cut.col1 - cut.col0;
        for_pixels(group, cut.out_height, cut.out_width, [&](int y, int x) {
            const int row1 = first_into(y + 1, height, cut.out_height), col1 = first_into(x + 1, width, cut.out_width);
            bool any = false;
            for (int row = first_into(y, height, cut.out_height); row < row1 && !any; ++row) {
                const std::uint8_t* line = args.source + ptrdiff_t{cut.row0 + row} * cut.width + cut.col0;
                for (int col = first_into(x, width, cut.out_width); col < col1; ++col) any |= line[col] > 127;
            }
            args.out[ptrdiff_t{y} * cut.out_width + x] = any ? 255 : 0;
        });
    }

    DMX_HD static int first_into(int output, int inputs, int outputs) {
        return static_cast<int>((std::int64_t{output} * inputs + outputs - 1) / outputs);
    }
};

}  // namespace dmx::gpu
