// Shared by the picture kernels: division of work among the threads of a group, and folds and scans within a block.
#pragma once

#include "group.hpp"

#if defined(__CUDA_ARCH__)
#define DMX_UNROLL _Pragma("unroll 8")
#else
#define DMX_UNROLL
#endif

namespace dmx::gpu {

constexpr int block_threads = 256;  // of every kernel here, on the device

DMX_HD inline int lesser(int a, int b) { return a < b ? a : b; }

DMX_HD inline int greater(int a, int b) { return a > b ? a : b; }

DMX_HD inline int parts_of(int whole, int part) { return whole / part + (whole % part != 0 ? 1 : 0); }

// Calls each(y, x) once for every pixel; the threads of a block take neighbours in a row.
template <class Group, typename Each>
DMX_HD void for_pixels(const Group& group, int height, int width, const Each& each) {
    const auto spans = static_cast<std::uint32_t>(parts_of(width, group.threads));
    const std::uint32_t count = spans * static_cast<std::uint32_t>(height);  // below 2^32, like the pixel count
    const auto blocks = static_cast<std::uint32_t>(group.blocks);
    for (std::uint32_t span = static_cast<std::uint32_t>(group.block); span < count; span += blocks) {
        const int y = static_cast<int>(span / spans);
        const int x = static_cast<int>(span % spans) * group.threads + group.thread;
        if (x < width) each(y, x);
    }
}

// The least value of a block's threads, in every thread. `scratch` has one number per thread; all threads must call
// this.
template <class Group>
DMX_HD int block_least(const Group& group, int value, int* scratch) {
    scratch[group.thread] = value;
    group.sync();
    for (int width = 1; width < group.threads; width *= 2) {
        if (group.thread % (2 * width) == 0 && group.thread + width < group.threads) {
            scratch[group.thread] = lesser(scratch[group.thread], scratch[group.thread + width]);
        }
        group.sync();
    }
    const int least = scratch[0];
    group.sync();  // before a thread writes to scratch again
    return least;
}

// Entries that a block's threads scan together. A row is split into this many parts for any number of threads.
constexpr int scanned = 256;

// values[i] becomes values[0] + ... + values[i], where + is `join`. `spare` has the same length, `scanned`. Call it
// after a sync of what was written; it ends with a sync. Returns where the result is.
template <typename Value, class Group, typename Join>
DMX_HD const Value* block_scan(const Group& group, Value* values, Value* spare, const Join& join) {
    for (int reach = 1; reach < scanned; reach *= 2) {
        for (int i = group.thread; i < scanned; i += group.threads) {
            spare[i] = i >= reach ? join(values[i - reach], values[i]) : values[i];
        }
        group.sync();  // one sync is enough: the next round writes where this one read, and reads what it wrote
        Value* const done = spare;
        spare = values;
        values = done;
    }
    return values;
}

}  // namespace dmx::gpu
