// The part of CUDA that csrc/cuda uses, on the host: found by #include <cuda_runtime.h> in place of the toolkit's.
//
// A thread of a block is a fiber, blocks run one after another, and the order of both can be chosen.  A fiber runs until
// it reaches a barrier, a warp-wide operation or its end, so what happens between two of those is one step.  Shared
// memory starts poisoned.  Misuse that a GPU would answer with a wrong result or a hang ends the process with a message:
// a barrier or a warp-wide operation that not all threads reach, a lane outside its own mask.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- The emulator: emulation.cpp, never compiled with a thread sanitizer ----

namespace emulation {

// Order of threads and blocks: 0 forward, 1 backward, others shuffled from that seed.
void set_order(unsigned order);
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
// Queues work on a stream: it is done at once, or while a graph is captured, when that is replayed.
void submit(void* stream, std::function<void()> work);
// The stream that all work since the last question was queued on; null where there was none, or more than one.
void* only_stream();
void capture(bool begin);
// How many pieces of work were done again.
int replay();
void* shared_memory(int key, std::size_t bytes);
void barrier();
// All lanes of the mask give a value and receive the 32 values of their warp.
const std::uint64_t* exchange(unsigned mask, int operation, std::uint64_t value);
void check_source(unsigned mask, int lane);
void check_aligned(const void* address, std::size_t bytes);
void fence();
void atomic_access(const void* address);
void copy_later(void* to, const void* from, int valid);
void commit_copies();
void finish_copies(int pending);

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() { emulation::fence(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const std::uint64_t* all = emulation::exchange(mask, 1, emulation::to_bits(value));
  const int source = static_cast<int>(threadIdx.x % 32) ^ lanes;
  emulation::check_source(mask, source);
  return emulation::from_bits<T>(all[source]);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  const std::uint64_t* all = emulation::exchange(mask, 2, emulation::to_bits(value));
  emulation::check_source(mask, source % 32);
  return emulation::from_bits<T>(all[source % 32]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const std::uint64_t* all = emulation::exchange(mask, 3, emulation::to_bits(value));
  const int source = static_cast<int>(threadIdx.x % 32) - lanes;
  if (source < 0) return value;
  emulation::check_source(mask, source);
  return emulation::from_bits<T>(all[source]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t* all = emulation::exchange(mask, 4, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && all[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}
// What a thread sanitizer must not see: an atomic operation does not race with another.
#define HPA_ATOMIC __attribute__((no_sanitize("thread"), noinline))

inline int __popc(unsigned bits) { return std::popcount(bits); }

template <class T>
HPA_ATOMIC T atomicAdd(T* address, T value) {
  emulation::atomic_access(address);
  std::uint64_t before = 0;
  T old;
  std::memcpy(&before, address, sizeof(T));
  std::memcpy(&old, &before, sizeof(T));
  const T sum = old + value;
  std::memcpy(address, &sum, sizeof(T));
  return old;
}
template <class T>
HPA_ATOMIC T atomicMax(T* address, T value) {
  emulation::atomic_access(address);
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
template <class T>
HPA_ATOMIC T atomicMin(T* address, T value) {
  emulation::atomic_access(address);
  const T old = *address;
  if (value < old) *address = value;
  return old;
}
template <class T>
T __ldcg(const T* address) { return *address; }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline double __dmul_rn(double a, double b) { volatile double product = a * b; return product; }
inline double __dadd_rn(double a, double b) { volatile double sum = a + b; return sum; }
using std::isfinite;
using std::max;
using std::min;
using std::sqrt;

// ---- The runtime ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream) {
  emulation::submit(stream, [=] { std::memset(data, value, bytes); });
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->blockDim.x % 32 != 0 || config->blockDim.x > 1024) return cudaErrorInvalidValue;
  // Arguments are copied, as a launch does.
  emulation::submit(config->stream, [grid = config->gridDim, block = config->blockDim, kernel,
                                     copies = std::tuple<Parameters...>(arguments...)] {
    emulation::run(grid, block, [&] { std::apply(kernel, copies); });
  });
  return cudaSuccess;
}
