// Helpers that the files of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "gpu/launch.hpp"

namespace dmx {

inline void require(bool fits, const char* message) {
    if (!fits) throw std::invalid_argument(message);
}

using Stream = std::optional<std::uintptr_t>;

// Where a kernel runs, from the last three arguments of every kernel: stream=None, blocks=1, threads=1.
inline Place place_of(const Stream& stream, int blocks, int threads) {
    if (stream) return {true, reinterpret_cast<void*>(*stream), 1, 1};
    require(blocks >= 1 && threads >= 1 && blocks <= 64 && threads <= 64, "blocks and threads on the host must lie in 1..64");
    return {false, nullptr, blocks, threads};
}

// Memory of the device, or of the host for a kernel that runs there, as Python passes it; 0 means no memory.
template <typename T>
T* at(std::uintptr_t pointer) {
    return reinterpret_cast<T*>(pointer);
}

void bind_pictures(nanobind::module_& gpu);
void bind_numbers(nanobind::module_& gpu);

}  // namespace dmx
