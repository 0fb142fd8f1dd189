// Runs a kernel (see group.hpp): on the device in a stream, or immediately on the host.
//
// nvcc compiles the files of this folder that include this one. Without nvcc the host's compiler does, and they run
// only on the host.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "group.hpp"

namespace dmx {

// Where a kernel runs: in a CUDA stream (its handle), or on the host with `blocks` by `threads` host threads.
struct Place {
    bool device = false;
    void* stream = nullptr;
    int blocks = 1, threads = 1;  // on the host; more than one for tests
};

// A kernel's grid on the device and its shared memory. blocks 0: enough to fill the device (the body strides).
// together: all blocks run at once, so the body may call sync_all.
struct Grid {
    int blocks = 0, threads = 256;
    std::size_t shared = 0;  // bytes of `group.shared`
    bool together = false;
};

// A grid for `count` pieces of work, one per thread; the body strides if there are more.
inline Grid grid_for(std::ptrdiff_t count, int threads = 256) {
    constexpr std::ptrdiff_t most = 4096;
    const std::ptrdiff_t blocks = (count + threads - 1) / threads;
    return {static_cast<int>(blocks < 1 ? 1 : blocks > most ? most : blocks), threads};
}

class Barrier {  // of host threads
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++waiting_ == count_) {
            waiting_ = 0;
            ++round_;
            passed_.notify_all();
        } else {
            passed_.wait(lock, [&] { return round != round_; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable passed_;
    int count_, waiting_ = 0, round_ = 0;
};

struct HostGroup {
    int block, blocks, thread, threads;
    unsigned char* shared;
    Barrier *of_block, *of_all;

    // Marked for host and device because the bodies are; only the host calls it.
    DMX_HD void sync() const {
#if !defined(__CUDA_ARCH__)
        if (threads > 1) of_block->wait();
#endif
    }
    DMX_HD void sync_all() const {
#if !defined(__CUDA_ARCH__)
        if (threads * blocks > 1) of_all->wait();
#endif
    }
    // Safe for several threads on the same place.
    DMX_HD void set_bits([[maybe_unused]] std::int32_t* at, [[maybe_unused]] std::int32_t bits) const {
#if !defined(__CUDA_ARCH__)
        const std::lock_guard<std::mutex> lock(atomics());
        *at |= bits;
#endif
    }
    DMX_HD void keep_least([[maybe_unused]] std::int32_t* at, [[maybe_unused]] std::int32_t value) const {
#if !defined(__CUDA_ARCH__)
        const std::lock_guard<std::mutex> lock(atomics());
        if (value < *at) *at = value;
#endif
    }
    static std::mutex& atomics() {
        static std::mutex mutex;
        return mutex;
    }
};

template <class Kernel>
void run_on_host(const Kernel& kernel, Grid grid, Place place) {
    const int count = place.blocks * place.threads;
    const std::size_t shared = (grid.shared + 15) / 16 * 16 + 16;
    std::vector<unsigned char> memory(shared * static_cast<std::size_t>(place.blocks));
    if (count == 1) {
        HostGroup group{0, 1, 0, 1, memory.data(), nullptr, nullptr};
        kernel(group);
        return;
    }
    Barrier all(count);
    std::vector<std::unique_ptr<Barrier>> blocks;
    for (int block = 0; block < place.blocks; ++block) blocks.push_back(std::make_unique<Barrier>(place.threads));
    std::vector<std::thread> running;
    for (int i = 0; i < count; ++i) {
        running.emplace_back([&, i] {
            const int block = i / place.threads;
            HostGroup group{block, place.blocks, i % place.threads, place.threads,
                            memory.data() + shared * static_cast<std::size_t>(block),
                            blocks[static_cast<std::size_t>(block)].get(), &all};
            kernel(group);
        });
    }
    for (std::thread& thread : running) thread.join();
}

#if defined(__CUDACC__)

struct DeviceGroup {
    int block, blocks, thread, threads;
    unsigned char* shared;
    DMX_HD void sync() const {
#if defined(__CUDA_ARCH__)
        __syncthreads();
#endif
    }
    DMX_HD void sync_all() const {
#if defined(__CUDA_ARCH__)
        cooperative_groups::this_grid().sync();
#endif
    }
    DMX_HD void set_bits([[maybe_unused]] std::int32_t* at, [[maybe_unused]] std::int32_t bits) const {
#if defined(__CUDA_ARCH__)
        atomicOr(at, bits);
#endif
    }
    DMX_HD void keep_least([[maybe_unused]] std::int32_t* at, [[maybe_unused]] std::int32_t value) const {
#if defined(__CUDA_ARCH__)
        atomicMin(at, value);
#endif
    }
};

template <class Kernel>
__global__ void run_on_device(const Kernel kernel) {
    extern __shared__ __align__(16) unsigned char shared[];
    DeviceGroup group{static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), static_cast<int>(threadIdx.x),
                      static_cast<int>(blockDim.x), shared};
    kernel(group);
}

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // reported here, so clear it for the next caller
    throw std::runtime_error(std::string("a CUDA kernel could not be started: ") + what + ": " + cudaGetErrorString(error));
}

// The number of blocks that run at once on a device. Asks the driver, which takes longer than a launch.
template <class Kernel>
int ask_resident_blocks(int device, int threads, std::size_t shared) {
    int processors = 0, each = 0;
    constexpr std::size_t granted = 48 * 1024;  // without setting an attribute
    if (shared > granted) {
        check(cudaFuncSetAttribute(run_on_device<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)), "cudaFuncSetAttribute");
    }
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, run_on_device<Kernel>, threads, shared), "occupancy");
    if (each == 0) throw std::runtime_error("a kernel needs more shared memory or registers than this GPU has");
    return processors * each;
}

// The same, remembered per kernel, device and size.
template <class Kernel>
int resident_blocks(int threads, std::size_t shared) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, std::size_t>, int> known;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    int& blocks = known[{device, threads, shared}];
    if (blocks == 0) blocks = ask_resident_blocks<Kernel>(device, threads, shared);
    return blocks;
}

template <class Kernel>
void run(const Kernel& kernel, Grid grid, Place place) {
    if (!place.device) return run_on_host(kernel, grid, place);
    const int most = resident_blocks<Kernel>(grid.threads, grid.shared);
    int blocks = grid.blocks == 0 || (grid.together && grid.blocks > most) ? most : grid.blocks;
    if (blocks < 1) blocks = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared;
    config.stream = static_cast<cudaStream_t>(place.stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = grid.together ? 1 : 0;
    config.attrs = &attribute;
    config.numAttrs = grid.together ? 1 : 0;
    check(cudaLaunchKernelEx(&config, run_on_device<Kernel>, kernel), "launch");
}

#else

template <class Kernel>
void run(const Kernel& kernel, Grid grid, Place place) {
    if (place.device) throw std::runtime_error("this build of the extension has no CUDA kernels");
    run_on_host(kernel, grid, place);
}

#endif

}  // namespace dmx
