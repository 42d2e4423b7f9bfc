// How kernels are started, and how blocks add up what they found.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include <machine.cuh>

namespace hpa::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

inline cudaStream_t stream_of(const Context& context) { return static_cast<cudaStream_t>(context.stream); }

// Makes the tensors' device the current one for the time of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Context& context) {
    require(cudaGetDevice(&before_), "cannot ask for the current device");
    if (before_ != context.device) require(cudaSetDevice(context.device), "cannot switch to the device of the tensors");
    switched_ = before_ != context.device;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// Blocks in one dimension: kernels take their place apart themselves, so that no size meets the 65535 of y and z.
template <class... Parameters, class... Arguments>
void launch(Context& context, std::int64_t blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("CUDA: a tensor is too large for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream_of(context);
  require(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel could not be started");
}

// Counters for LastBlock, zero when the kernels that follow on the stream start.
inline unsigned* zeroed_counters(Context& context, std::int64_t count) {
  const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(unsigned));
  void* counters = context.allocate(bytes);
  require(cudaMemsetAsync(counters, 0, static_cast<std::size_t>(bytes), stream_of(context)), "cannot clear memory");
  return static_cast<unsigned*>(counters);
}

template <class T>
T* allocate(Context& context, std::int64_t count) {
  return static_cast<T*>(context.allocate(count * static_cast<std::int64_t>(sizeof(T))));
}

inline constexpr std::int64_t div_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* data, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0;
}

// A matrix whose rows can be read and written 16 bytes at a time (a last piece of a row apart).
inline bool rows_aligned(const MatrixView& matrix) {
  return (matrix.col_stride == 1 || matrix.cols <= 1) && aligned(matrix.data, 16) &&
         (matrix.rows <= 1 || matrix.row_stride * element_size(matrix.dtype) % 16 == 0);
}

// ---- On the device ----

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// True in all threads of the block that comes last of `blocks` to this point; what the others wrote before is visible
// to it.  `flag` is shared memory of one element.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) flag[0] = atomicAdd(counter, 1u) == blocks - 1 ? 1u : 0u;
  __syncthreads();
  const bool last = flag[0] != 0;
  if (last) __threadfence();
  return last;
}

}  // namespace hpa::cuda
