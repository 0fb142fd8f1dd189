// Kernels on masks: the latent mask, and weights by the Chebyshev distance from the mask (the larger of the distances
// in rows and columns).
//
// The distance is separable: first the distance to the nearest mask pixel in the row, then the least over all rows of
// the larger of that and the distance in rows.
#pragma once

#include <cmath>

#include "../feather.hpp"
#include "block.hpp"
#include "pictures.hpp"
#include "tiles.hpp"

namespace dmx::gpu {

struct LatentMask {
    LatentMaskArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const LatentMaskArgs& a = args;
        const int width = a.width / a.factor;
        for_pixels(group, a.height / a.factor, width, [&](int v, int u) {
            const std::uint8_t* block = a.mask + (ptrdiff_t{v} * a.width + u) * a.factor;
            bool any = false;
            for (int y = 0; y < a.factor; ++y) {
                for (int x = 0; x < a.factor; ++x) any |= block[ptrdiff_t{y} * a.width + x] >= 128;
            }
            const ptrdiff_t cell = ptrdiff_t{v} * width + u;
            if (a.out != nullptr) a.out[cell] = any ? 1.0F : 0.0F;
            if (a.network != nullptr) Values{a.network, a.half}.put(cell, any ? 1.0F : 0.0F);
        });
    }
};

// One block per row: the distances in the row to the mask (inverted: to pixels outside the mask), at most reach + 1.
struct DistancesInRows {
    const std::uint8_t* mask;
    const Field* field_at;
    std::uint16_t* distances;
    int inverted;
    std::int32_t* deepest;  // null, or where later passes keep a least value; set to 255 here

    struct Ends {
        int last, first;  // mask pixels: the last up to and including a part, the first from a part on
    };
    static constexpr std::size_t shared = 2 * scanned * sizeof(Ends);

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Field field = *field_at;
        if (deepest != nullptr && group.block == 0 && group.thread == 0) *deepest = 255;
        for (int y = field.row0 + group.block; y < field.row1; y += group.blocks) {
            const std::uint8_t* row = mask + ptrdiff_t{y} * field.width;
            const Ends* ends = find_ends(group, field, row);
            put_out(group, field, row, ends, distances + ptrdiff_t{y} * field.width);
            group.sync();  // before the ends of the next row
        }
    }

  private:
    static constexpr int none_before = -(1 << 30), none_after = 1 << 30;

    DMX_HD bool set(std::uint8_t value) const { return (value > 127) != (inverted != 0); }

    DMX_HD static int part_length(const Field& field) { return parts_of(field.col1 - field.col0, scanned); }

    // After the scan ends[i].last is that of parts 0 to i, and ends[i].first that of parts scanned - 1 - i to the last.
    template <class Group>
    DMX_HD const Ends* find_ends(const Group& group, const Field& field, const std::uint8_t* row) const {
        Ends* const ends = reinterpret_cast<Ends*>(group.shared);
        const int length = part_length(field);
        for (int part = group.thread; part < scanned; part += group.threads) {
            const int begin = field.col0 + part * length, end = lesser(begin + length, field.col1);
            int last = none_before, first = none_after;
            for (int x = begin; x < end; ++x) {
                if (!set(row[x])) continue;
                last = x;
                if (first == none_after) first = x;
            }
            ends[part].last = last;
            ends[scanned - 1 - part].first = first;
        }
        group.sync();
        return block_scan(group, ends, ends + scanned, [](const Ends& a, const Ends& b) {
            return Ends{greater(a.last, b.last), lesser(a.first, b.first)};
        });
    }

    template <class Group>
    DMX_HD void put_out(const Group& group, const Field& field, const std::uint8_t* row, const Ends* ends,
                        std::uint16_t* out) const {
        const int length = part_length(field);
        for (int x = field.col0 + group.thread; x < field.col1; x += group.threads) {
            const int part = (x - field.col0) / length;
            const int begin = field.col0 + part * length, end = lesser(begin + length, field.col1);
            int left = x, right = x;
            while (left >= begin && !set(row[left])) --left;
            while (right < end && !set(row[right])) ++right;
            if (left < begin) left = part > 0 ? ends[part - 1].last : none_before;
            if (right == end) right = part < scanned - 1 ? ends[scanned - 2 - part].first : none_after;
            out[x] = static_cast<std::uint16_t>(lesser(lesser(x - left, right - x), field.reach + 1));
        }
    }
};

// The distance of pixel (y, x), from the distances in rows. Searches up and down until no row can be nearer.
DMX_HD inline int distance_at(const Field& field, const std::uint16_t* distances, int y, int x) {
    const std::uint16_t* at = distances + ptrdiff_t{y} * field.width + x;
    int best = lesser(*at, field.reach + 1);
    const int most = greater(y - field.row0, field.row1 - 1 - y);
    for (int k = 1; k < best && k <= most; ++k) {
        const ptrdiff_t away = ptrdiff_t{k} * field.width;
        const int up = y - k >= field.row0 ? at[-away] : best, down = y + k < field.row1 ? at[away] : best;
        best = lesser(best, greater(k, lesser(up, down)));
    }
    return best;
}

DMX_HD inline bool inside(const Field& field, int y, int x) {
    return y >= field.row0 && y < field.row1 && x >= field.col0 && x < field.col1;
}

struct Feather {
    FeatherArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Field field = *args.field;
        for_pixels(group, field.height, field.width, [&](int y, int x) {
            std::uint8_t value = 0;
            if (inside(field, y, x)) {
                const int distance = distance_at(field, args.scratch, y, x);
                if (args.dilate != 0) {
                    value = distance <= field.reach ? 255 : 0;
                } else {
                    value = feather_value(distance, field.reach);
                }
            }
            args.out[ptrdiff_t{y} * field.width + x] = value;
        });
    }
};

// The feather from outside the mask inwards, and its least value.
struct SeamRim {
    SeamArgs args;
    static constexpr std::size_t shared = block_threads * sizeof(int);

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Field field = *args.field;
        int least = 255;
        for_pixels(group, field.height, field.width, [&](int y, int x) {
            std::uint8_t value = 255;
            if (inside(field, y, x)) value = feather_value(distance_at(field, args.scratch, y, x), field.reach);
            least = lesser(least, value);
            args.out[ptrdiff_t{y} * field.width + x] = value;
        });
        least = block_least(group, least, reinterpret_cast<int*>(group.shared));
        if (group.thread == 0 && least < 255) group.keep_least(args.deepest, least);
    }
};

// Stretches the values so that the deepest pixel has 0; 255 stays.
struct SeamLevels {
    SeamArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Field field = *args.field;
        const int deepest = *args.deepest;
        if (deepest >= 255) return;
        const double stretch = 255.0 / (255 - deepest);
        for_pixels(group, field.row1 - field.row0, field.col1 - field.col0, [&](int y, int x) {
            std::uint8_t* const at = args.out + ptrdiff_t{field.row0 + y} * field.width + field.col0 + x;
            *at = byte_of(static_cast<int>(std::rint((*at - deepest) * stretch)));
        });
    }
};

}  // namespace dmx::gpu
