// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and Box-Muller normals.
// core/noise.py defines the numbers; this file repeats them.
#pragma once

#include <cmath>

#include "parallel.hpp"

namespace dmx {

struct Words {
    std::uint32_t word[4];
};

DMX_HD inline Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * counter.word[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter.word[2];
        counter = {{static_cast<std::uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(b),
                    static_cast<std::uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(a)}};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

DMX_HD inline double unit_interval(std::uint32_t word) { return (word + 0.5) * (1.0 / 4294967296.0); }

// Two independent normals from two words.
DMX_HD inline void box_muller(std::uint32_t first, std::uint32_t second, float out[2]) {
    const double radius = std::sqrt(-2.0 * std::log(unit_interval(first)));
#if defined(__CUDA_ARCH__)
    double sine, cosine;  // no reduction of the angle is needed; within a few units of the last of 53 bits
    sincospi(2.0 * unit_interval(second), &sine, &cosine);
#else
    const double angle = 6.283185307179586476925286766559 * unit_interval(second);
    const double sine = std::sin(angle), cosine = std::cos(angle);
#endif
    out[0] = static_cast<float>(radius * cosine);
    out[1] = static_cast<float>(radius * sine);
}

// Block b of (seed, draw, step) has the elements 4b .. 4b+3.
DMX_HD inline void normal_block(std::uint64_t seed, std::uint32_t draw, std::uint32_t step, std::uint64_t block,
                                float out[4]) {
    const Words words = philox({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), step, draw}},
                               static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    box_muller(words.word[0], words.word[1], out);
    box_muller(words.word[2], words.word[3], out + 2);
}

inline void normals(std::uint64_t seed, std::uint32_t draw, std::uint32_t step, float* out, ptrdiff_t count) {
    parallel_for((count + 3) / 4, 2048, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t block = begin; block < end; ++block) {
            float values[4];
            normal_block(seed, draw, step, static_cast<std::uint64_t>(block), values);
            for (ptrdiff_t i = 0; i < 4 && 4 * block + i < count; ++i) out[4 * block + i] = values[i];
        }
    });
}

}  // namespace dmx
