// Threads that wait for work between calls, and memory that each of them keeps.
//
// Starting a thread for a call costs as much as a comparison's softmax, and memory that is mapped
// and unmapped for each row makes all threads of the process wait for one another.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

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

class Pool {
  public:
    // Calls work(0) to work(tasks - 1), shared among so many threads, this one included. While
    // another call is under way the calling thread does all of it alone.
    static void run(std::size_t threads, std::size_t tasks,
                    const std::function<void(std::size_t)>& work) {
        const std::size_t helpers = std::min(threads, tasks) - 1;
        const std::unique_lock<std::mutex> alone(one_at_a_time(), std::try_to_lock);
        if (tasks < 2 || helpers == 0 || !alone.owns_lock()) {
            for (std::size_t task = 0; task < tasks; ++task) work(task);
            return;
        }
        instance().share(helpers, tasks, work);
    }

  private:
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

    void share(std::size_t helpers, std::size_t tasks,
               const std::function<void(std::size_t)>& work) {
        {
            const std::lock_guard<std::mutex> hold(mutex_);
            for (; threads_ < helpers; ++threads_)
                std::thread([this, index = threads_] { help(index); }).detach();
            work_ = &work;
            tasks_ = tasks;
            next_ = 0;
            helpers_ = busy_ = helpers;
            ++round_;
        }
        called_.notify_all();
        take();
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return busy_ == 0; });
    }

    void take() {
        for (std::size_t task = next_++; task < tasks_; task = next_++) (*work_)(task);
    }

    void help(std::size_t index) {
        std::size_t seen = 0;
        while (true) {
            {
                std::unique_lock<std::mutex> hold(mutex_);
                called_.wait(hold, [&] { return round_ != seen && index < helpers_; });
                seen = round_;
            }
            take();
            const std::lock_guard<std::mutex> hold(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    const long process_ = process();
    std::mutex mutex_;
    std::condition_variable called_, done_;
    std::atomic<std::size_t> next_{0};
    const std::function<void(std::size_t)>* work_ = nullptr;
    std::size_t tasks_ = 0, threads_ = 0, helpers_ = 0, busy_ = 0, round_ = 0;
};

}  // namespace meiqa
