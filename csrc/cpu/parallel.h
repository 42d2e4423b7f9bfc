// Loops over independent tasks.  What a task computes must not depend on who runs it: tasks are cut by shape alone, so
// results are the same for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hpa {

// Threads worth waking for `work` elementary steps: one for every `grain` of them.
inline int useful_threads(std::int64_t work, std::int64_t grain, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(work / grain, 1, std::max(threads, 1)));
}

// Calls body(task, thread) for each task; thread < threads numbers the caller's scratch.  body must not throw.
template <class Body>
void parallel_for(std::int64_t tasks, int threads, const Body& body) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t task = 0; task < tasks; ++task) body(task, thread);
    }
    return;
  }
#endif
  for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace hpa
