// Kernels are written once for host and device: as a body over a group of threads.
//
// A kernel is a struct of plain arguments with a body `template <class Group> DMX_HD void operator()(Group& group)
// const`. The body knows which thread of which block it is and strides over its work by these numbers, whatever they
// are. It waits with `sync` (its block) or `sync_all` (all blocks, only in kernels launched together). On the host a
// group is one thread of one block unless a test asks for more. On the device it is the usual grid.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#endif

#include "../common.hpp"

namespace dmx {

// IEEE binary16 as in memory. Conversions round to nearest even; host and device give the same bits.
struct Half {
    std::uint16_t bits;
};

DMX_HD inline float float_of(float value) { return value; }

DMX_HD inline float float_of(Half half) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(half.bits));
#else
    const std::uint32_t sign = std::uint32_t{half.bits & 0x8000U} << 16, rest = half.bits & 0x7FFFU;
    std::uint32_t bits;
    if (rest >= 0x7C00U) {  // infinite or not a number
        bits = sign | 0x7F800000U | (rest & 0x3FFU) << 13;
    } else if (rest >= 0x400U) {
        bits = sign | ((rest << 13) + (112U << 23));
    } else {  // subnormal or zero: rest units of 2^-24
        const float small = static_cast<float>(rest) * (1.0F / 16777216.0F);
        std::memcpy(&bits, &small, sizeof bits);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

DMX_HD inline Half half_of(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
    const std::uint32_t rest = bits & 0x7FFFFFFFU;
    std::uint32_t half;
    if (rest > 0x7F800000U) {
        half = 0x7FFFU;  // the NaN that the device always gives
        return {static_cast<std::uint16_t>(half)};
    }
    if (rest >= 0x477FF000U) {  // 65520 and more round to infinity
        half = 0x7C00U;
    } else if (rest >= 0x38800000U) {  // normal: round away 13 bits, ties to even
        half = (rest - (112U << 23) + 0xFFFU + ((rest >> 13) & 1U)) >> 13;
    } else if (rest >= 0x33000000U) {  // subnormal: as units of 2^-24, ties to even
        const std::uint32_t mantissa = (rest & 0x7FFFFFU) | 0x800000U, shift = 126U - (rest >> 23);
        const std::uint32_t below = mantissa & ((1U << shift) - 1U), middle = 1U << (shift - 1U);
        half = mantissa >> shift;
        if (below > middle || (below == middle && (half & 1U) != 0U)) ++half;
    } else {
        half = 0U;
    }
    return {static_cast<std::uint16_t>(sign | half)};
#endif
}

template <typename T>
DMX_HD inline T value_of(float value);
template <>
DMX_HD inline float value_of<float>(float value) {
    return value;
}
template <>
DMX_HD inline Half value_of<Half>(float value) {
    return half_of(value);
}

// The numbers of a network: float or half. The type is the same for a whole launch, so the branch costs nothing.
struct Reals {
    void* at;
    bool half;
    DMX_HD float operator[](ptrdiff_t i) const {
        return half ? float_of(static_cast<const Half*>(at)[i]) : static_cast<const float*>(at)[i];
    }
    DMX_HD void set(ptrdiff_t i, float value) const {
        if (half) {
            static_cast<Half*>(at)[i] = half_of(value);
        } else {
            static_cast<float*>(at)[i] = value;
        }
    }
};

DMX_HD inline bool is_finite(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7F800000U) != 0x7F800000U;
}

// The sum over the threads of a block, the same in every thread. Its order depends only on the block's size. `scratch`
// has one double per thread; all threads of the block must call this.
template <class Group>
DMX_HD double block_sum(Group& group, double value, double* scratch) {
    scratch[group.thread] = value;
    group.sync();
    for (int width = 1; width < group.threads; width *= 2) {
        if (group.thread % (2 * width) == 0 && group.thread + width < group.threads) {
            scratch[group.thread] += scratch[group.thread + width];
        }
        group.sync();
    }
    const double sum = scratch[0];
    group.sync();  // before a thread writes to scratch again
    return sum;
}

}  // namespace dmx
