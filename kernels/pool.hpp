// Threads that wait for work between calls, and memory that each of them keeps.
//
// Starting a thread for a call costs as much as a comparison's softmax, and memory that is mapped
// and unmapped for each row makes all threads of the process wait for one another. Within a call
// work comes many times in a row: threads look for it, or for its end, a while before they sleep.

#pragma once

#include "crew.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace meiqa {

// Floats that the calling thread keeps from one use to the next, beginning on a cache line. What
// they hold is undefined; the next use may move them.
inline float* kept_floats(std::size_t count) {
    struct Kept {
        float* floats = nullptr;
        std::size_t count = 0;
        ~Kept() { std::free(floats); }
    };
    thread_local Kept kept;
    if (kept.count < count) {
        std::free(kept.floats);
        kept.count = 0;
        constexpr std::size_t line = 64;
        const std::size_t bytes = (count * sizeof(float) + line - 1) / line * line;
        kept.floats = static_cast<float*>(std::aligned_alloc(line, bytes));
        if (!kept.floats) throw std::bad_alloc();
        kept.count = count;
    }
    return kept.floats;
}

// Tells the processor that a loop waits.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until something is so; false if it is not for longer than a thread may look for work.
template <class Condition>
bool soon(const Condition& condition) {
    constexpr std::chrono::microseconds longest{50};
    const auto began = std::chrono::steady_clock::now();
    while (true) {
        for (int look = 0; look < 32; ++look, pause())
            if (condition()) return true;
        if (std::chrono::steady_clock::now() - began > longest) return condition();
    }
}

class Pool {
  public:
    // Calls work(crew), which may share tasks among so many threads, this one included. While
    // another call is under way the calling thread is alone.
    template <class Work>
    static void gather(std::size_t threads, const Work& work) {
        const std::unique_lock<std::mutex> alone(one_at_a_time(), std::try_to_lock);
        if (threads < 2 || !alone.owns_lock()) {
            work(Crew{});
            return;
        }
        Pool& pool = instance();
        pool.open(threads - 1);
        const Closing closing{pool};
        work(Crew{threads, &pool, [](void* self, std::size_t tasks, Task task, const void* what) {
                      static_cast<Pool*>(self)->share(tasks, task, what);
                  }});
    }

  private:
    // Ends the looking for work, also where something was thrown.
    struct Closing {
        Pool& pool;
        ~Closing() { pool.open_ = false; }
    };

    using Task = void (*)(const void* what, std::size_t task, std::size_t worker);

    // Never destroyed: its threads wait when the process ends. A fork has none of them.
    static Pool& instance() {
        static Pool* pool = nullptr;
        if (!pool || pool->process_ != process()) pool = new Pool;
        return *pool;
    }

    static std::mutex& one_at_a_time() {
        static std::mutex mutex;
        return mutex;
    }

    static long process() {
#ifdef _WIN32
        return 0;
#else
        return static_cast<long>(getpid());
#endif
    }

    void open(std::size_t helpers) {
        for (; threads_ < helpers; ++threads_)
            std::thread([this, worker = threads_ + 1] { help(worker); }).detach();
        helpers_ = helpers;
        open_ = true;
    }

    void share(std::size_t tasks, Task task, const void* what) {
        task_ = task;
        what_ = what;
        done_ = 0;
        offer_ = (std::uint64_t{helpers_} << kBits | tasks) << kBits;
        if (asleep_ > threads_ - helpers_) {
            { const std::lock_guard<std::mutex> hold(mutex_); }
            called_.notify_all();
        }
        take(0);
        const auto all_done = [&] { return done_ == tasks; };
        if (!soon(all_done)) {
            std::unique_lock<std::mutex> hold(mutex_);
            waiting_ = true;
            finished_.wait(hold, all_done);
            waiting_ = false;
        }
        if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
    }

    // What a task throws waits for the others to end: they use what its thrower holds.
    void run(std::size_t task, std::size_t worker) noexcept {
        try {
            task_(what_, task, worker);
        } catch (...) {
            const std::lock_guard<std::mutex> hold(mutex_);
            failed_ = std::current_exception();
        }
    }

    // How many helpers are called, how many tasks there are, and which is the next, in one word: who
    // takes a task has one of those that are offered at that moment, and no others are offered before
    // it is done.
    static constexpr int kBits = 24;

    static bool offers(std::uint64_t offer, std::size_t worker) {
        constexpr std::uint64_t mask = (std::uint64_t{1} << kBits) - 1;
        return worker <= offer >> 2 * kBits && (offer & mask) < (offer >> kBits & mask);
    }

    void take(std::size_t worker) {
        std::uint64_t offer = offer_;
        while (offers(offer, worker)) {
            if (!offer_.compare_exchange_weak(offer, offer + 1)) continue;
            run(offer & ((std::uint64_t{1} << kBits) - 1), worker);
            ++done_;
            if (waiting_) {
                { const std::lock_guard<std::mutex> hold(mutex_); }
                finished_.notify_one();
            }
            offer = offer_;
        }
    }

    void help(std::size_t worker) {
        const auto wanted = [&] { return offers(offer_, worker); };
        while (true) {
            if (!soon([&] { return wanted() || !open_; }) || !wanted()) {
                std::unique_lock<std::mutex> hold(mutex_);
                ++asleep_;
                called_.wait(hold, wanted);
                --asleep_;
            }
            take(worker);
        }
    }

    const long process_ = process();
    std::mutex mutex_;
    std::condition_variable called_, finished_;
    std::atomic<std::uint64_t> offer_{0};
    std::atomic<std::size_t> done_{0}, asleep_{0};
    std::atomic<bool> open_{false}, waiting_{false};
    Task task_ = nullptr;
    const void* what_ = nullptr;
    std::exception_ptr failed_;
    std::size_t threads_ = 0, helpers_ = 0;
};

}  // namespace meiqa
