// Merges a subject into the weights of many slots in one launch. ../merge.hpp has the arithmetic; core/slots.py and
// engine/device/records.py describe the layout.
#pragma once

#include "../merge.hpp"
#include "group.hpp"
#include "records.hpp"

namespace dmx {

struct alignas(16) Sixteen {
    std::uint32_t word[4];
};

DMX_HD inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// An 8-bit float as in memory: E4M3 without infinities, as FP8 GEMMs take their weights.
struct Eighth {
    std::uint8_t bits;
};

// To the nearest, ties to even; beyond 448 to 448. Host and device give the same bits.
DMX_HD inline Eighth eighth_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t sign = bits >> 24 & 0x80U, rest = bits & 0x7FFFFFFFU;
    std::uint32_t code;
    if (rest > 0x7F800000U) return {0x7FU};  // not a number
    if (rest >= 0x43E80000U) {               // from 464 on 480 would be nearer, which does not exist
        code = 0x7EU;
    } else if (rest < 0x3C800000U) {  // below 2^-6: units of 2^-9, which an addition rounds to
        float small;
        std::memcpy(&small, &rest, sizeof small);
        const float shifted = small + 16384.0F;
        std::memcpy(&code, &shifted, sizeof code);
        code &= 0x0FU;
    } else {  // round away 20 bits, ties to even
        code = ((rest + 0x7FFFFU + (rest >> 20 & 1U)) >> 20) - ((127U - 7U) << 3);
        if (code > 0x7EU) code = 0x7EU;
    }
    return {static_cast<std::uint8_t>(sign | code)};
}

DMX_HD inline void put(float value, Eighth* at) { *at = eighth_of(value); }

// `count` neighbours in memory, moved 16 bytes at once where that many are there.
template <typename T, int count>
DMX_HD void load(const T* from, T (&values)[count]) {
    if constexpr (count == 1) {
        values[0] = *from;
    } else {
        constexpr int pieces = count * static_cast<int>(sizeof(T)) / 16;
        static_assert(pieces * 16 == count * static_cast<int>(sizeof(T)));
        Sixteen held[pieces];
        for (int p = 0; p < pieces; ++p) held[p] = reinterpret_cast<const Sixteen*>(from)[p];
        std::memcpy(values, held, sizeof values);
    }
}

template <typename T, int count>
DMX_HD void store(const T (&values)[count], T* to) {
    if constexpr (count == 1) {
        *to = values[0];
    } else {
        constexpr int pieces = count * static_cast<int>(sizeof(T)) / 16;
        static_assert(pieces * 16 == count * static_cast<int>(sizeof(T)));
        Sixteen held[pieces];
        std::memcpy(held, values, sizeof values);
        for (int p = 0; p < pieces; ++p) reinterpret_cast<Sixteen*>(to)[p] = held[p];
    }
}

// A thread merges a tile of `tile_rows` by `columns` numbers, which it alone reads and writes, so that a weight may be
// merged in place. 32 sums stay in registers, and each factor that is read serves a row or a column of them.
template <typename In, typename Out, int columns>
struct MergeTile {
    static constexpr int tile_rows = columns == 1 ? 4 : 32 / columns;

    DMX_HD static std::int64_t tiles_of(const Merge& slot) {
        return std::int64_t{(slot.rows + tile_rows - 1) / tile_rows} * (slot.columns / columns);
    }

    // Whether every row begins where `columns` numbers can be moved at once.
    DMX_HD static bool fits(const Merge& slot) {
        const auto wide = [&](const void* pointer, ptrdiff_t size) {
            return is_aligned(pointer, 16) && slot.stride * size % 16 == 0;
        };
        return slot.columns % columns == 0 && wide(slot.source, sizeof(In)) && wide(slot.target, sizeof(Out)) &&
               is_aligned(slot.right, 16);
    }

    DMX_HD static void merge(const Merge& slot, std::int64_t tile) {
        const int each = slot.columns / columns;
        const int row = static_cast<int>(tile / each) * tile_rows, column = static_cast<int>(tile % each) * columns;
        float sums[tile_rows][columns] = {};
        add_products(slot, row, column, sums);
        for (int i = 0; i < tile_rows; ++i) {
            if (row + i >= slot.rows) break;
            const ptrdiff_t at = ptrdiff_t{row + i} * slot.stride + column;
            In weight[columns];
            Out out[columns];
            load(static_cast<const In*>(slot.source) + at, weight);
            for (int j = 0; j < columns; ++j) put(merged(float_of(weight[j]), sums[i][j]) * slot.out_scale, out + j);
            store(out, static_cast<Out*>(slot.target) + at);
        }
    }

  private:
    DMX_HD static void add_products(const Merge& slot, int row, int column, float (&sums)[tile_rows][columns]) {
        const float* left[tile_rows];
        for (int i = 0; i < tile_rows; ++i) {
            const int there = row + i < slot.rows ? row + i : row;  // rows beyond the end are not written
            left[i] = slot.left + ptrdiff_t{there} * slot.rank;
        }
        const float* right = slot.right + column;
        for (int r = 0; r < slot.rank; ++r, right += slot.columns) {
            float factors[columns];
            load(right, factors);
            for (int j = 0; j < columns; ++j) factors[j] = factors[j] * slot.right_scale;
            for (int i = 0; i < tile_rows; ++i) {
                const float factor = left[i][r] * slot.left_scale;
                for (int j = 0; j < columns; ++j) sums[i][j] = sums[i][j] + factor * factors[j];
            }
        }
    }
};

// W + left right for every slot of the table, rounded once. Work is handed out in tasks of `task_tiles` tiles, whose
// numbers grow along the table; `tasks` of them.
struct MergeWeights {
    const Merge* slots;
    int count;
    std::int64_t tasks;

    static constexpr int task_tiles = 256;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (std::int64_t task = group.block; task < tasks; task += group.blocks) {
            const Merge slot = slots[find(task)];
            if (slot.kind == Merge::floats) {
                merge<float, float, 4>(group, slot, task - slot.first);
            } else if (slot.kind == Merge::halves) {
                merge<Half, Half, 8>(group, slot, task - slot.first);
            } else {
                merge<Half, Eighth, 16>(group, slot, task - slot.first);
            }
        }
    }

    // The tasks of a slot, whatever its alignment: enough for single numbers, of which an aligned slot needs few.
    static std::int64_t tasks_of(const Merge& slot) {
        const std::int64_t tiles = slot.kind == Merge::floats   ? tiles_of<float, float, 4>(slot)
                                   : slot.kind == Merge::halves ? tiles_of<Half, Half, 8>(slot)
                                                                : tiles_of<Half, Eighth, 16>(slot);
        return (tiles + task_tiles - 1) / task_tiles;
    }

  private:
    template <typename In, typename Out, int columns>
    static std::int64_t tiles_of(const Merge& slot) {
        using Wide = MergeTile<In, Out, columns>;
        return Wide::fits(slot) ? Wide::tiles_of(slot) : MergeTile<In, Out, 1>::tiles_of(slot);
    }

    // The last slot whose first task is not behind this one.
    DMX_HD int find(std::int64_t task) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (slots[middle].first <= task) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }

    template <typename In, typename Out, int columns, class Group>
    DMX_HD static void merge(Group& group, const Merge& slot, std::int64_t task) {
        if (MergeTile<In, Out, columns>::fits(slot)) {
            merge_task<MergeTile<In, Out, columns>>(group, slot, task);
        } else {
            merge_task<MergeTile<In, Out, 1>>(group, slot, task);
        }
    }

    template <class Tile, class Group>
    DMX_HD static void merge_task(Group& group, const Merge& slot, std::int64_t task) {
        const std::int64_t tiles = Tile::tiles_of(slot), first = task * task_tiles;
        const std::int64_t end = first + task_tiles < tiles ? first + task_tiles : tiles;
        for (std::int64_t tile = first + group.thread; tile < end; tile += group.threads) Tile::merge(slot, tile);
    }
};

}  // namespace dmx
