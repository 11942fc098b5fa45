// Those who share a piece of work. Plain data, as it crosses to kernels of other instructions.

#pragma once

#include <cstddef>

namespace meiqa {

struct Crew {
    std::size_t size = 1;  // workers, the caller included
    void* pool = nullptr;
    // Calls work(what, task, worker) for each task; gives back control when all are done.
    void (*share)(void* pool, std::size_t tasks,
                  void (*work)(const void* what, std::size_t task, std::size_t worker),
                  const void* what) = nullptr;
};

// Of each side its own, as nothing with code may be shared.
namespace {

// Calls work(task, worker) for tasks 0 to tasks - 1, in any order, worker below the crew's size.
template <class Work>
inline void shared(const Crew& crew, std::size_t tasks, const Work& work) {
    if (crew.size == 1 || tasks < 2) {
        for (std::size_t task = 0; task < tasks; ++task) work(task, 0);
        return;
    }
    crew.share(
        crew.pool, tasks,
        [](const void* what, std::size_t task, std::size_t worker) {
            (*static_cast<const Work*>(what))(task, worker);
        },
        &work);
}

}  // namespace
}  // namespace meiqa
