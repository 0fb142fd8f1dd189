// Puts a subject's factors into a network: lays them out from a file, and copies them to their places in a batch.
// core/slots.py describes the layout.
#pragma once

#include "group.hpp"
#include "latents.hpp"
#include "records.hpp"

namespace dmx {

struct alignas(16) Sixteen {
    std::uint32_t word[4];
};

DMX_HD inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// Copies bytes[begin .. end), a whole number of T, with the threads of a block.
template <typename T, class Group>
DMX_HD void copy_as(const Group& group, const unsigned char* from, unsigned char* to, ptrdiff_t begin, ptrdiff_t end) {
    const auto size = static_cast<ptrdiff_t>(sizeof(T));
    for (ptrdiff_t at = begin + group.thread * size; at < end; at += group.threads * size) {
        *reinterpret_cast<T*>(to + at) = *reinterpret_cast<const T*>(from + at);
    }
}

// Copies `count` bytes, 2 or 16 at once; both addresses are even.
template <class Group>
DMX_HD void copy_bytes(const Group& group, const unsigned char* from, unsigned char* to, ptrdiff_t count) {
    const bool wide = is_aligned(from, sizeof(Sixteen)) && is_aligned(to, sizeof(Sixteen));
    const ptrdiff_t middle = wide ? count - count % static_cast<ptrdiff_t>(sizeof(Sixteen)) : 0;
    copy_as<Sixteen>(group, from, to, 0, middle);
    copy_as<std::uint16_t>(group, from, to, middle, count);
}

// out[target * pictures + picture * size + i] = row[source + i] for every segment, bit for bit.
struct PlaceFactors {
    const unsigned char* row;
    const Segment* segments;
    int count;
    unsigned char* out;
    int pictures, picture;
    int bytes;  // of a number

    static constexpr int parts = 4;  // per segment, since some are several times as long as others

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (ptrdiff_t task = group.block; task < ptrdiff_t{count} * parts; task += group.blocks) {
            const Segment segment = segments[task / parts];
            const ptrdiff_t length = (segment.size / parts + 8) / 8 * 8;  // multiples of 16 bytes
            const ptrdiff_t begin = task % parts * length, left = segment.size - begin;
            if (left <= 0) continue;
            const ptrdiff_t target = segment.target * pictures + picture * segment.size + begin;
            copy_bytes(group, row + (segment.source + begin) * bytes, out + target * bytes,
                       (left < length ? left : length) * bytes);
        }
    }
};

// Scales each factor and lays it out in its slot's shape, with zeros where the file has less.
struct PackFactors {
    Reals raw;
    const Factor* factors;
    int count;
    Reals out;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (int f = group.block; f < count; f += group.blocks) {
            const Factor factor = factors[f];
            const int size = factor.target_rows * factor.target_cols;
            for (int i = group.thread; i < size; i += group.threads) {
                const int row = i / factor.target_cols, column = i % factor.target_cols;
                const bool there = row < factor.rows && column < factor.cols;
                const ptrdiff_t at = factor.source + ptrdiff_t{row} * factor.cols + column;
                out.set(factor.target + i, there ? raw[at] * factor.scale : 0.0F);
            }
        }
    }
};

}  // namespace dmx
