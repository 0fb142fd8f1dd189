// Shared by all kernels: marks for functions on host and device, and for host loops built for several CPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

// Per-element functions have DMX_HD: nvcc makes the CUDA kernels from the same source as the host loops.
#if defined(__CUDACC__)
#define DMX_HD __host__ __device__
#else
#define DMX_HD
#endif

// Host loops have DMX_CLONES: a portable wheel has them for plain x86-64, AVX2 and AVX-512, and the loader chooses.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && defined(__x86_64__) && defined(__GLIBC__)
#define DMX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DMX_HAS_CLONES 1
#else
#define DMX_CLONES
#define DMX_HAS_CLONES 0
#endif

#if defined(_MSC_VER)
#define DMX_RESTRICT __restrict
#else
#define DMX_RESTRICT __restrict__
#endif

namespace dmx {

using std::ptrdiff_t;
using std::size_t;

DMX_HD inline int clamped(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

DMX_HD inline std::uint8_t byte_of(int value) { return static_cast<std::uint8_t>(clamped(value, 0, 255)); }

}  // namespace dmx
