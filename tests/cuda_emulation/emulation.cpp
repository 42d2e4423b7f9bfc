// Fibers for the threads of a block, and what they wait for.  Compiled without a thread sanitizer even where the kernels
// have one: the emulator's own bookkeeping is not part of the program under test.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#if defined(HPA_EMULATION_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(HPA_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Leaves the stack pointer of this fiber in *from and goes on with `to`.  ucontext would do, but asks the kernel about
// signals at each switch, which is fifty times slower.
extern "C" void hpa_switch_stack(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl hpa_switch_stack
hpa_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator switches stacks by hand, and only knows how on x86-64"
#endif

namespace emulation {

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kSharedBytes = 48 * 1024, kRedZone = 64, kArena = 256 * 1024;

enum class State { ready, barrier, exchange, done };

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStack);
  State state = State::ready;
  unsigned mask = 0;
  int operation = 0;
  std::uint64_t value = 0;
  int parity = 0;  // which of the two result arrays of the warp the next exchange uses
  std::vector<std::vector<Copy>> copies;
  int barriers = 0;                    // that it has come to
  char clock = 0;                      // what this thread has done before its last fence
  std::set<char*> seen;                // clocks of threads whose atomic operations came before one of ours
  void* sanitizer = nullptr;
};

struct Warp {
  std::uint64_t results[2][32];
};

unsigned order = 0;
bool capturing = false;
std::vector<std::function<void()>> graph;  // work of the last capture
std::set<void*> streams;                   // that work was queued on since somebody asked
void* scheduler = nullptr;  // its stack pointer
std::vector<std::unique_ptr<Fiber>> fibers;  // kept between blocks for their stacks
std::vector<Warp> warps;
int current = 0, threads = 0;
const std::function<void()>* body = nullptr;
std::map<int, void*> shared;
std::unique_ptr<char[]> arena;
std::size_t arena_used = 0, shared_used = 0;
// Two for each block: a barrier and the next one take turns, since a thread can be at the next one before another has
// left this one.  What a block's barriers order, they order in that block alone.
std::unique_ptr<std::uint64_t[]> barrier_clocks;
// What passes from thread to thread of a block at a barrier: fences that came before, and atomic operations seen.
std::set<char*> fenced_before, seen_before;
char grid_clock = 0;
std::map<const void*, std::set<char*>> atomics;  // clocks of the threads that touched an address
#if defined(HPA_EMULATION_TSAN)
void* scheduler_fiber = nullptr;
// Kept until the grid is done, for their clocks; and because giving memory back would be an access to it.
std::vector<std::unique_ptr<Fiber>> retired;
int unburied = 0;
std::vector<std::unique_ptr<char[]>> retired_arenas;
std::vector<std::unique_ptr<std::uint64_t[]>> retired_clocks;
#endif
#if defined(HPA_EMULATION_ASAN)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;
#endif

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %d)\n", message, blockIdx.x, current);
  std::fflush(stderr);
  std::_Exit(86);
}

Fiber& self() { return *fibers[static_cast<std::size_t>(current)]; }

void acquire([[maybe_unused]] char* clock) {
#if defined(HPA_EMULATION_TSAN)
  __tsan_acquire(clock);
#endif
}
void release([[maybe_unused]] char* clock) {
#if defined(HPA_EMULATION_TSAN)
  __tsan_release(clock);
#endif
}

void to_scheduler(State state) {
  Fiber& fiber = self();
  fiber.state = state;
#if defined(HPA_EMULATION_ASAN)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
#if defined(HPA_EMULATION_TSAN)
  __tsan_switch_to_fiber(scheduler_fiber, 1);
#endif
  hpa_switch_stack(&fiber.stack_pointer, scheduler);
#if defined(HPA_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

void enter() {
#if defined(HPA_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  if (!self().copies.empty()) finish_copies(0);
  release(&grid_clock);
  to_scheduler(State::done);
}

void resume(int thread) {
  current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  Fiber& fiber = self();
#if defined(HPA_EMULATION_ASAN)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
#if defined(HPA_EMULATION_TSAN)
  __tsan_switch_to_fiber(fiber.sanitizer, 1);
#endif
  hpa_switch_stack(&scheduler, fiber.stack_pointer);
#if defined(HPA_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lets a warp go on whose lanes have all come to the same exchange.
bool complete_exchange(int thread) {
  const int first = thread / 32 * 32;
  const Fiber& leader = *fibers[static_cast<std::size_t>(thread)];
  for (int lane = 0; lane < 32; ++lane) {
    if ((leader.mask >> lane & 1) == 0) continue;
    current = first + lane;
    const Fiber& other = self();
    if (other.state == State::done) fail("a warp-wide operation names a lane that has ended");
    if (other.state != State::exchange) return false;
    if (other.mask != leader.mask || other.operation != leader.operation) {
      fail("lanes of one warp disagree about a warp-wide operation or its mask");
    }
  }
  auto& results = warps[static_cast<std::size_t>(thread / 32)].results[leader.parity];
  for (int lane = 0; lane < 32; ++lane) {
    if ((leader.mask >> lane & 1) != 0) results[lane] = fibers[static_cast<std::size_t>(first + lane)]->value;
  }
  const unsigned mask = leader.mask;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) fibers[static_cast<std::size_t>(first + lane)]->state = State::ready;
  }
  return true;
}

#if defined(HPA_EMULATION_TSAN)
// Not before the grid is done, if it can be: the number of a thread that is gone goes to a new one, which then seems to
// have written what the old one wrote.  The sanitizer has numbers for 8128 threads.
void bury() {
  for (const auto& fiber : retired) {
    if (fiber->sanitizer != nullptr) __tsan_destroy_fiber(std::exchange(fiber->sanitizer, nullptr));
  }
  unburied = 0;
}
#endif

void run_block() {
#if defined(HPA_EMULATION_TSAN)
  if (unburied + threads > 7000) bury();
  unburied += threads;
#endif
  // Poisoned: NaN as floats, -1 as integers.  A new arena a block, as blocks share no shared memory.
  arena = std::make_unique_for_overwrite<char[]>(kArena);
  std::memset(arena.get(), 0xff, kArena);
  barrier_clocks = std::make_unique<std::uint64_t[]>(2);
  fenced_before.clear();
  seen_before.clear();
  shared.clear();
  arena_used = shared_used = 0;
#if defined(HPA_EMULATION_ASAN)
  ASAN_POISON_MEMORY_REGION(arena.get(), kArena);
#endif
  std::vector<int> sequence(static_cast<std::size_t>(threads));
  for (int i = 0; i < threads; ++i) sequence[static_cast<std::size_t>(i)] = order == 1 ? threads - 1 - i : i;
  if (order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(order + blockIdx.x));

  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[static_cast<std::size_t>(i)];
    fiber.state = State::ready;
    fiber.parity = 0;
    fiber.barriers = 0;
    fiber.copies.clear();
    fiber.clock = 0;
    fiber.seen.clear();
#if defined(HPA_EMULATION_ASAN)
    // The last frames of the thread before never returned.
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);
#endif
    // Six registers, the address to return to, and a word that keeps the stack aligned as after a call.
    auto* top = reinterpret_cast<void**>(
        reinterpret_cast<std::uintptr_t>(fiber.stack.get() + kStack) / 16 * 16);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&enter);
    std::fill(top - 8, top - 2, nullptr);
    fiber.stack_pointer = top - 8;
#if defined(HPA_EMULATION_TSAN)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
  for (int alive = threads; alive > 0;) {
    bool progress = false;
    for (const int thread : sequence) {
      Fiber& fiber = *fibers[static_cast<std::size_t>(thread)];
      if (fiber.state == State::exchange) complete_exchange(thread);
      if (fiber.state != State::ready) continue;
      resume(thread);
      progress = true;
      if (fiber.state == State::done) --alive;
    }
    bool all_wait = true;
    for (int i = 0; i < threads; ++i) {
      const State state = fibers[static_cast<std::size_t>(i)]->state;
      all_wait = all_wait && (state == State::barrier || state == State::done);
    }
    if (all_wait && alive > 0) {
      if (alive != threads) fail("some threads have ended, others wait at a barrier");
      for (int i = 0; i < threads; ++i) fibers[static_cast<std::size_t>(i)]->state = State::ready;
      progress = true;
    }
    if (!progress && alive > 0) {
      for (int i = 0; i < threads && !progress; ++i) {
        progress = fibers[static_cast<std::size_t>(i)]->state == State::exchange && complete_exchange(i);
      }
      if (!progress) fail("threads wait for each other at different places");
    }
  }
#if defined(HPA_EMULATION_TSAN)
  retired_arenas.push_back(std::move(arena));
  retired_clocks.push_back(std::move(barrier_clocks));
  // Another block's threads are other threads, with clocks of their own.
  for (auto& fiber : fibers) retired.push_back(std::move(fiber));
  fibers.clear();
#endif
#if defined(HPA_EMULATION_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(arena.get(), kArena);
#endif
}

}  // namespace

void set_order(unsigned value) { order = value; }

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  threads = static_cast<int>(block.x);
  body = &kernel;
  warps.assign(static_cast<std::size_t>(threads / 32), Warp{});
#if defined(HPA_EMULATION_TSAN)
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> blocks(grid.x);
  for (unsigned i = 0; i < grid.x; ++i) blocks[i] = order == 1 ? grid.x - 1 - i : i;
  if (order > 1) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order));
  for (const unsigned index : blocks) {
    blockIdx = dim3(index, 0, 0);
    run_block();
  }
  acquire(&grid_clock);  // the next kernel of the stream sees all of this one
  atomics.clear();
#if defined(HPA_EMULATION_TSAN)
  bury();
  retired.clear();
  retired_arenas.clear();
  retired_clocks.clear();
#endif
}

void submit(void* stream, std::function<void()> work) {
  streams.insert(stream);
  if (capturing) {
    graph.push_back(std::move(work));
  } else {
    work();
  }
}

void* only_stream() {
  const std::set<void*> named = std::exchange(streams, {});
  return named.size() == 1 ? *named.begin() : nullptr;
}

void capture(bool begin) {
  if (begin) graph.clear();
  capturing = begin;
}

int replay() {
  for (const auto& work : graph) work();
  return static_cast<int>(graph.size());
}

void* shared_memory(int key, std::size_t bytes) {
  void*& place = shared[key];
  if (place == nullptr) {
    shared_used += (bytes + 15) / 16 * 16;
    if (shared_used > kSharedBytes) fail("more than 48 KB of shared memory");
    place = arena.get() + arena_used;
#if defined(HPA_EMULATION_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(place, bytes);
#endif
    arena_used += (bytes + 15) / 16 * 16 + kRedZone;
  }
  return place;
}

void barrier() {
  Fiber& fiber = self();
  auto* clock = reinterpret_cast<char*>(&barrier_clocks[fiber.barriers++ % 2]);
  if (fiber.clock != 0) fenced_before.insert(&fiber.clock);
  seen_before.insert(fiber.seen.begin(), fiber.seen.end());
  release(clock);
  to_scheduler(State::barrier);
  acquire(clock);
  fiber.seen.insert(seen_before.begin(), seen_before.end());
}

const std::uint64_t* exchange(unsigned mask, int operation, std::uint64_t value) {
  Fiber& fiber = self();
  if ((mask >> (current % 32) & 1) == 0) fail("a lane is not in the mask of its own warp-wide operation");
  fiber.mask = mask;
  fiber.operation = operation;
  fiber.value = value;
  const int parity = fiber.parity;
  to_scheduler(State::exchange);
  fiber.parity = 1 - parity;
  return warps[static_cast<std::size_t>(current / 32)].results[parity];
}

void check_source(unsigned mask, int lane) {
  if ((mask >> lane & 1) == 0) fail("a lane reads from a lane that is not in the mask");
}

void check_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("an access is not aligned to its size");
}

// Two threads are ordered by fences around atomic operations on one address: what the first did before its fence is
// visible to the second after its fence.  Fences are sequentially consistent, so that barriers may lie between a fence
// and the atomic operation, which another thread of the block then does for all.
void fence() {
  Fiber& fiber = self();
  for (char* clock : fiber.seen) acquire(clock);
  fiber.seen.clear();
  release(&fiber.clock);
  fiber.clock = 1;
}

void atomic_access(const void* address) {
  Fiber& fiber = self();
  std::set<char*>& clocks = atomics[address];
  fiber.seen.insert(clocks.begin(), clocks.end());
  if (fiber.clock != 0) clocks.insert(&fiber.clock);
  clocks.insert(fenced_before.begin(), fenced_before.end());
}

void copy_later(void* to, const void* from, int valid) {
  Fiber& fiber = self();
  check_aligned(to, 16);
  check_aligned(from, 16);
  if (fiber.copies.empty()) fiber.copies.emplace_back();
  fiber.copies.back().push_back({to, from, valid});
}

void commit_copies() {
  Fiber& fiber = self();
  if (fiber.copies.empty()) fiber.copies.emplace_back();
  fiber.copies.emplace_back();
}

void finish_copies(int pending) {
  Fiber& fiber = self();
  // The last group is open: it has not been committed, and is not waited for.
  while (static_cast<int>(fiber.copies.size()) > pending + 1) {
    for (const Copy& copy : fiber.copies.front()) {
      auto* to = static_cast<char*>(copy.to);
      std::memset(to, 0, 16);
      std::memcpy(to, copy.from, static_cast<std::size_t>(copy.valid));
    }
    fiber.copies.erase(fiber.copies.begin());
  }
}

}  // namespace emulation
