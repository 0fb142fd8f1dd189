// The hole fill as launches: two that find the hole, then two for each blur.
//
// Along a row a window is a difference of prefix sums, which a block makes in shared memory. Down the columns each
// thread takes four neighbouring bytes and moves its windows over a strip of rows. As on the host, only the hole's
// bounding box gets a result, and rows without a hole are blurred once per radius. Only the device knows where the hole
// is, so launches cover the whole picture and many threads may have nothing to do.
#pragma once

#include "../fill.hpp"
#include "block.hpp"
#include "pictures.hpp"

namespace dmx::gpu {

struct FillPlan {
    std::uint8_t* picture;
    const std::uint8_t* mask;
    int height, width;
    int words;              // of four bytes in a row of `hole` and `blurred`
    std::int32_t* box;      // row0, row1, col0, col1 of the hole; row0 >= row1 without a hole
    std::int32_t* first_of; // per row: the hole's first column (width: no hole)
    std::int32_t* last_of;  // per row: its last column (-1: no hole)
    std::uint32_t* hole;    // 255 on bytes of the hole, else 0
    std::uint32_t* blurred; // the pass along the rows

    static int words_of(int width) { return (3 * width + 3) / 4; }
    static std::size_t head(int height) { return (16 + 8 * static_cast<std::size_t>(height) + 15) / 16 * 16; }
    static std::size_t bytes_for(int height, int width) {
        return head(height) + 8 * static_cast<std::size_t>(height) * static_cast<std::size_t>(words_of(width));
    }
    // The largest `bytes_for` of any picture with as many pixels and no side below `least_side`: six bytes per pixel,
    // and per row at most eight of its own and six where its words end.
    static constexpr int least_side = 8;
    static std::size_t most_bytes(int height, int width) {
        const std::size_t pixels = static_cast<std::size_t>(height) * static_cast<std::size_t>(width);
        return 6 * pixels + 14 * (pixels / least_side) + 32;
    }

    static FillPlan of(const FillArgs& args) {
        auto* const box = static_cast<std::int32_t*>(args.scratch);
        const int words = words_of(args.width);
        auto* const bytes = static_cast<std::uint8_t*>(args.scratch) + head(args.height);
        auto* const hole = reinterpret_cast<std::uint32_t*>(bytes);
        std::int32_t* const first_of = box + 4;
        return {args.picture, args.mask, args.height, args.width, words, box, first_of, first_of + args.height,
                hole, hole + ptrdiff_t{args.height} * words};
    }
};

// One block per row finds the row's part of the hole, and its bytes.
struct FindRows {
    FillPlan plan;
    static constexpr std::size_t shared = block_threads * sizeof(int);

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        int* const scratch = reinterpret_cast<int*>(group.shared);
        for (int y = group.block; y < plan.height; y += group.blocks) {
            const std::uint8_t* row = plan.mask + ptrdiff_t{y} * plan.width;
            auto* const hole = reinterpret_cast<std::uint8_t*>(plan.hole + ptrdiff_t{y} * plan.words);
            int first = plan.width, before_last = 0;  // minus the last column, so that the least value wins for both
            for (int i = group.thread; i < 4 * plan.words; i += group.threads) {
                const int x = i / 3;
                const bool holed = x < plan.width && row[x] >= 127;
                hole[i] = holed ? 255 : 0;
                if (holed) first = lesser(first, x), before_last = lesser(before_last, -x - 1);
            }
            first = block_least(group, first, scratch);
            before_last = block_least(group, before_last, scratch);
            if (group.thread == 0) plan.first_of[y] = first, plan.last_of[y] = -before_last - 1;
        }
    }
};

// One block finds the box around the parts of all rows.
struct FindBox {
    FillPlan plan;
    static constexpr std::size_t shared = block_threads * sizeof(int);

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        if (group.block != 0) return;
        int* const scratch = reinterpret_cast<int*>(group.shared);
        int least[4] = {plan.height, 0, plan.width, 0};  // row0, -row1, col0, -col1
        for (int y = group.thread; y < plan.height; y += group.threads) {
            if (plan.last_of[y] < 0) continue;
            least[0] = lesser(least[0], y), least[1] = lesser(least[1], -y - 1);
            least[2] = lesser(least[2], plan.first_of[y]), least[3] = lesser(least[3], -plan.last_of[y] - 1);
        }
        for (int i = 0; i < 4; ++i) {
            const int side = block_least(group, least[i], scratch);
            if (group.thread == 0) plan.box[i] = i % 2 == 0 ? side : -side;
        }
    }
};

// One block per row. Shared memory has prefix sums at every `grain` (a power of two) pixels, at most `most_points`.
struct BlurRows {
    FillPlan plan;
    int radius, all_rows, grain_bits;
    BoxWeights weights;

    static constexpr int most_points = 3072;

    struct Sum {
        std::uint32_t of[3];
    };

    static int grain_bits_for(int width) {
        int bits = 0;
        while ((width >> bits) + 1 > most_points) ++bits;
        return bits;
    }
    // Sums at the points, then the totals of the row's parts and the spare memory to scan them.
    static std::size_t shared_for(int width) {
        return (static_cast<std::size_t>(width >> grain_bits_for(width)) + 1 + 2 * scanned) * sizeof(Sum);
    }

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int row0 = plan.box[0], row1 = plan.box[1];
        if (row0 >= row1) return;
        const int first = greater(0, row0 - radius - 1), last = lesser(plan.height, row1 + radius + 1);
        for (int y = first + group.block; y < last; y += group.blocks) {
            if (all_rows == 0 && plan.last_of[y] < 0) continue;
            const std::uint8_t* row = plan.picture + ptrdiff_t{3} * plan.width * y;
            make_sums(group, row);
            put_out(group, row, reinterpret_cast<std::uint8_t*>(plan.blurred + ptrdiff_t{y} * plan.words));
            group.sync();  // before the next row's sums
        }
    }

  private:
    template <class Group>
    DMX_HD void make_sums(const Group& group, const std::uint8_t* row) const {
        const int points = (plan.width >> grain_bits) + 1, each = parts_of(points, scanned);
        Sum* const sums = reinterpret_cast<Sum*>(group.shared);
        Sum* const totals = sums + points;
        for (int part = group.thread; part < scanned; part += group.threads) {
            Sum sum{{0, 0, 0}};
            for (int point = part * each; point < lesser((part + 1) * each, points); ++point) {
                sums[point] = sum;  // within the part, so far
                const int stop = lesser((point + 1) << grain_bits, plan.width);
                for (int x = point << grain_bits; x < stop; ++x) {
                    for (int c = 0; c < 3; ++c) sum.of[c] += row[3 * x + c];
                }
            }
            totals[part] = sum;
        }
        group.sync();
        const Sum* const before = block_scan(group, totals, totals + scanned, [](const Sum& a, const Sum& b) {
            return Sum{{a.of[0] + b.of[0], a.of[1] + b.of[1], a.of[2] + b.of[2]}};
        });
        for (int part = group.thread; part < scanned; part += group.threads) {
            if (part == 0) continue;
            for (int point = part * each; point < lesser((part + 1) * each, points); ++point) {
                for (int c = 0; c < 3; ++c) sums[point].of[c] += before[part - 1].of[c];
            }
        }
        group.sync();
    }

    // The sum of the row's pixels before x (0..width).
    DMX_HD std::uint32_t sum_before(const std::uint32_t* sums, const std::uint8_t* row, int x, int channel) const {
        const int point = x >> grain_bits;
        std::uint32_t sum = sums[3 * point + channel];
        for (int i = point << grain_bits; i < x; ++i) sum += row[3 * i + channel];
        return sum;
    }

    // Writes whole words of the box's columns.
    template <class Group>
    DMX_HD void put_out(const Group& group, const std::uint8_t* row, std::uint8_t* out) const {
        const auto* const sums = reinterpret_cast<const std::uint32_t*>(group.shared);
        const int begin = 3 * plan.box[2] / 4 * 4, end = lesser(parts_of(3 * plan.box[3], 4) * 4, 3 * plan.width);
        for (int i = begin + group.thread; i < end; i += group.threads) {
            const int x = i / 3, channel = i % 3;
            const int low = x - radius, high = x + radius + 1, edge = plan.width - 1;
            std::uint32_t window = sum_before(sums, row, lesser(high, plan.width), channel) -
                                   sum_before(sums, row, greater(low, 0), channel);
            if (low < 0) window += static_cast<std::uint32_t>(-low) * row[channel];
            if (high > plan.width) window += static_cast<std::uint32_t>(high - plan.width) * row[3 * edge + channel];
            const std::uint32_t outside = std::uint32_t{row[3 * greater(low - 1, 0) + channel]} +
                                          row[3 * lesser(high, edge) + channel];
            out[i] = box_value(window, outside, weights);
        }
    }
};

// One thread per word and strip of rows.
struct BlurColumns {
    FillPlan plan;
    int radius, strip;
    BoxWeights weights;

    // Few threads per block: there may be fewer threads than the device can run, and all are limited by reads.
    static constexpr int threads = 64;

    // Starting a window costs as many reads as its length. Long strips share this cost; short ones keep more threads
    // busy.
    static int strip_for(int radius) { return clamped(radius / 2, 16, 64); }

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int row0 = plan.box[0], row1 = plan.box[1];
        if (row0 >= row1) return;
        const int word0 = 3 * plan.box[2] / 4, words = parts_of(3 * plan.box[3], 4) - word0;
        const int items = words * parts_of(row1 - row0, strip);
        const int all = group.blocks * group.threads;
        for (int item = group.block * group.threads + group.thread; item < items; item += all) {
            const int begin = row0 + item / words * strip;
            blur(word0 + item % words, begin, lesser(begin + strip, row1));
        }
    }

  private:
    struct Windows {
        std::uint32_t of[4];
        DMX_HD void add(std::uint32_t word, std::uint32_t times) {
            for (int i = 0; i < 4; ++i) of[i] += byte(word, i) * times;
        }
    };

    DMX_HD static std::uint32_t byte(std::uint32_t word, int i) { return word >> (8 * i) & 255U; }

    DMX_HD std::uint32_t word_at(int y, int word) const {
        return plan.blurred[ptrdiff_t{clamped(y, 0, plan.height - 1)} * plan.words + word];
    }

    // The windows around row y. Where they overhang the picture, the first or last row is repeated.
    DMX_HD Windows start(int y, int word) const {
        const int low = y - radius, high = y + radius, edge = plan.height - 1;
        Windows windows{{0, 0, 0, 0}};
        if (low < 0) windows.add(word_at(0, word), static_cast<std::uint32_t>(lesser(-low, high - low + 1)));
        if (high > edge) windows.add(word_at(edge, word), static_cast<std::uint32_t>(high - edge));
        const int last = lesser(high, edge);
        const std::uint32_t* at = plan.blurred + ptrdiff_t{greater(low, 0)} * plan.words + word;
        DMX_UNROLL
        for (int row = greater(low, 0); row <= last; ++row) {
            windows.add(*at, 1);
            at += plan.words;
        }
        return windows;
    }

    // Reads several rows before the first write, because the compiler must assume that a write may change them.
    DMX_HD void blur(int word, int begin, int end) const {
        constexpr int batch = 4;
        Windows windows = start(begin - 1, word);
        std::uint32_t entering = word_at(begin + radius, word);
        for (int y = begin; y < end; y += batch) {
            std::uint32_t above[batch], below[batch], hole[batch];
            for (int i = 0; i < batch; ++i) {
                const int row = lesser(y + i, end - 1);
                above[i] = word_at(row - radius - 1, word), below[i] = word_at(row + radius + 1, word);
                hole[i] = plan.hole[ptrdiff_t{row} * plan.words + word];
            }
            for (int i = 0; i < batch; ++i) {
                if (y + i >= end) break;
                put(y + i, word, moved_down(windows, entering, above[i], below[i]), hole[i]);
                entering = below[i];
            }
        }
    }

    // Moves the windows by one row and returns the blurred bytes there.
    DMX_HD std::uint32_t moved_down(Windows& windows, std::uint32_t entering, std::uint32_t above,
                                    std::uint32_t below) const {
        std::uint32_t values = 0;
        for (int i = 0; i < 4; ++i) {
            windows.of[i] += byte(entering, i) - byte(above, i);
            values |= std::uint32_t{box_value(windows.of[i], byte(above, i) + byte(below, i), weights)} << (8 * i);
        }
        return values;
    }

    // Writes only bytes of the hole, so the alignment of the picture does not matter.
    DMX_HD void put(int y, int word, std::uint32_t values, std::uint32_t hole) const {
        std::uint8_t* const to = plan.picture + ptrdiff_t{3} * plan.width * y + ptrdiff_t{4} * word;
        if (hole == 0xFFFFFFFFU && reinterpret_cast<std::uintptr_t>(to) % 4 == 0) {
            *reinterpret_cast<std::uint32_t*>(to) = values;
            return;
        }
        for (int i = 0; i < 4; ++i) {
            if (byte(hole, i) != 0) to[i] = static_cast<std::uint8_t>(byte(values, i));
        }
    }
};

}  // namespace dmx::gpu
