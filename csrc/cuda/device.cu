// Whether kernels can run here.  The module is loaded on machines without a GPU and without a driver, too: the CUDA
// runtime is linked in statically and asks for the driver when it is first used.
#include "launch.cuh"

namespace hpa::cuda {

std::string unavailable() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) {
    cudaGetLastError();  // the error is reported here; it must not be found again by a later call
    return cudaGetErrorString(status);
  }
  return devices > 0 ? "" : "no CUDA device";
}

}  // namespace hpa::cuda
