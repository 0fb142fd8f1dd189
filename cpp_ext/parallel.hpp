// parallel_for: one range shared among a few threads; results never depend on how many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "common.hpp"

namespace dmx {

inline std::atomic<int>& thread_setting() {
    static std::atomic<int> setting{0};  // 0: as many as the machine has
    return setting;
}

inline int thread_count() {
    const int set = thread_setting().load(std::memory_order_relaxed);
    return set > 0 ? set : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls body(begin, end) on disjoint parts of [0, count), each of at least `grain` items: below that a thread costs
// more than it saves. An exception of any part is rethrown here; a thread the system refuses is done without.
template <typename Body>
void parallel_for(ptrdiff_t count, ptrdiff_t grain, const Body& body) {
    const ptrdiff_t parts = std::min<ptrdiff_t>(thread_count(), count / std::max<ptrdiff_t>(grain, 1));
    if (parts <= 1) {
        if (count > 0) body(ptrdiff_t{0}, count);
        return;
    }
    std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
    const auto run = [&](ptrdiff_t part) {
        try {
            body(count * part / parts, count * (part + 1) / parts);
        } catch (...) {
            errors[static_cast<size_t>(part)] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(parts));
    ptrdiff_t started = 1;
    try {
        for (; started < parts; ++started) threads.emplace_back(run, started);
    } catch (const std::system_error&) {
    }
    run(0);
    for (ptrdiff_t part = started; part < parts; ++part) run(part);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

}  // namespace dmx
