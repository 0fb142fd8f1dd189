// parallel_for: splits a range among a few threads. Results never depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
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

// Threads that sleep between jobs. The caller works as well and waits only for helpers that have begun, never for one
// that has not woken up: when other processes keep the cores busy, helpers cost nothing. For the same reason a process
// forked from this one, which has no helpers, simply works alone.
class Helpers {
  public:
    // Runs `work` on this thread and on up to `count` helpers at once; `work` returns when nothing is left to do.
    void run(int count, const std::function<void()>& work) {
        const std::unique_lock<std::mutex> ours(owner_, std::try_to_lock);
        if (!ours) return work();  // another caller has the helpers
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            start(count);
            work_ = &work;
            wanted_ = count;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        work_ = nullptr;
        done_.wait(lock, [&] { return active_ == 0; });
    }

    static Helpers& shared() {
        static Helpers* const helpers = new Helpers;  // never destroyed: its threads may outlive static objects
        return *helpers;
    }

  private:
    void start(int count) {
        try {
            for (; started_ < count; ++started_) std::thread(&Helpers::serve, this).detach();
        } catch (const std::system_error&) {  // the system has no more threads: use those that were started
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return work_ != nullptr && wanted_ > 0; });
            const std::function<void()>* work = work_;
            --wanted_, ++active_;
            lock.unlock();
            (*work)();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void()>* work_ = nullptr;  // the job, while there is one
    int wanted_ = 0, active_ = 0, started_ = 0;
};

// Calls body(begin, end) on disjoint parts of [0, count). Each part has at least `grain` items: with fewer, a thread
// costs more than it saves. A thread that has finished a part takes the next one. An exception in a part is rethrown
// here. Do not nest.
template <typename Body>
void parallel_for(ptrdiff_t count, ptrdiff_t grain, const Body& body) {
    constexpr ptrdiff_t parts_per_thread = 4;
    const ptrdiff_t most = count / std::max<ptrdiff_t>(grain, 1);
    const ptrdiff_t workers = std::min<ptrdiff_t>(thread_count(), most);
    if (workers <= 1) {
        if (count > 0) body(ptrdiff_t{0}, count);
        return;
    }
    const ptrdiff_t parts = std::min(most, workers * parts_per_thread);
    std::atomic<ptrdiff_t> next{0};
    std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
    Helpers::shared().run(static_cast<int>(workers) - 1, [&] {
        for (ptrdiff_t part = next++; part < parts; part = next++) {
            try {
                body(count * part / parts, count * (part + 1) / parts);
            } catch (...) {
                errors[static_cast<size_t>(part)] = std::current_exception();
            }
        }
    });
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

}  // namespace dmx
