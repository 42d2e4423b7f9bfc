// Loops over independent tasks.  What a task computes must not depend on who runs it: tasks are cut by shape alone, so
// results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

namespace hpa {

namespace parallel {

// Calls body(context) on a team of up to `threads` threads, the caller among them, and returns when all are done.
void run_team(int threads, void (*body)(void*), void* context);

// Where the team comes from: "process" (an OpenMP runtime that somebody else loaded, in a torch process torch's own),
// the file name of a runtime loaded for us, or "none" (one thread).
std::string runtime();

// Threads that this process may run on; 1 where there is no runtime.
int max_threads();

}  // namespace parallel

// Threads worth waking for `work` elementary steps of which `grain` are worth a thread: all or one.  Teams keep one
// size because an OpenMP runtime that is asked for a smaller team than the last ends the threads it does not need, and
// starts them again for the next: dear where torch shares the pool.  Threads without a task go straight back.
inline int useful_threads(std::int64_t work, std::int64_t grain, int threads) {
  return work >= 2 * grain ? std::max(threads, 1) : 1;
}

// Calls body(task, thread) for each task; thread < threads numbers the caller's scratch.  body must not throw.
template <class Body>
void parallel_for(std::int64_t tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  struct Loop {
    const Body& body;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    std::atomic<int> joined{0};
  } loop{body, tasks};
  parallel::run_team(
      threads,
      [](void* context) {
        auto& shared = *static_cast<Loop*>(context);
        const int thread = shared.joined.fetch_add(1, std::memory_order_relaxed);
        for (;;) {
          const std::int64_t task = shared.next.fetch_add(1, std::memory_order_relaxed);
          if (task >= shared.tasks) return;
          shared.body(task, thread);
        }
      },
      &loop);
}

}  // namespace hpa
