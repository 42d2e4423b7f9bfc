// Teams of threads from whatever OpenMP runtime the process already has.
//
// A second runtime would bring a second pool: its threads spin for milliseconds after each of their loops, on the cores
// that the first one's threads want, and a program that alternates between both runs at half its speed.  torch loads
// its runtime with global visibility, so the one entry that is needed, GOMP_parallel (the stable interface of GCC's
// runtime, which LLVM's and Intel's offer too), is looked up among what is loaded before a library is opened.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <system_error>
#include <thread>
#include <vector>

namespace hpa::parallel {
namespace {

using Parallel = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

struct Runtime {
  Parallel parallel = nullptr;
  std::string name = "none";
};

Parallel look_up(void* library) { return reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel")); }

Runtime find_runtime() {
#ifdef HPA_OPENMP
  if (const Parallel loaded = look_up(RTLD_DEFAULT)) return {loaded, "process"};
  for (const char* name : {"libgomp.so.1", "libomp.so.5", "libomp.so", "libiomp5.so"}) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_GLOBAL);
    if (library == nullptr) continue;
    if (const Parallel opened = look_up(library)) return {opened, name};
  }
#endif
  return {};
}

const Runtime& runtime_in_use() {
  static const Runtime found = find_runtime();
  return found;
}

// A runtime's pool does not survive fork(): in the child it would wait for threads that are gone, for ever.
std::atomic<bool> is_forked_child{false};
[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });

// A team for this call alone; starting it takes some ten microseconds a thread.
void run_new_team(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  body(context);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_team(int threads, void (*body)(void*), void* context) {
  const Parallel start = runtime_in_use().parallel;
  if (start == nullptr || threads <= 1) {
    body(context);
    return;
  }
  if (is_forked_child.load(std::memory_order_relaxed)) {
    run_new_team(threads, body, context);
    return;
  }
  start(body, context, static_cast<unsigned>(threads), 0);
}

std::string runtime() { return runtime_in_use().name; }

int max_threads() {
  if (runtime_in_use().parallel == nullptr) return 1;
#ifdef __linux__
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof(usable), &usable) == 0) return std::max(1, CPU_COUNT(&usable));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace hpa::parallel
