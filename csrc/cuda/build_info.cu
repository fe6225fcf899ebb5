// What the CUDA runtime sees on this machine; see csrc/minidiff_fast.h.
#include "minidiff_fast.h"

#include <cstring>

#include <cuda_runtime_api.h>

extern "C" int minidiff_fast_cuda_versions(int* runtime, int* driver) {
  if (runtime == nullptr || driver == nullptr) return MINIDIFF_FAST_EINVALID;
  *runtime = 0;
  *driver = 0;
  const cudaError_t status = cudaRuntimeGetVersion(runtime);
  return static_cast<int>(status != cudaSuccess ? status : cudaDriverGetVersion(driver));
}

extern "C" int minidiff_fast_cuda_device_count(int* count) {
  if (count == nullptr) return MINIDIFF_FAST_EINVALID;
  *count = 0;
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) {
    *count = 0;
    cudaGetLastError();  // the runtime keeps the error and would hand it to the next caller
  }
  return static_cast<int>(status);
}

extern "C" int minidiff_fast_cuda_device(int index, char* name, size_t name_size, int* major, int* minor) {
  if (index < 0 || name == nullptr || name_size == 0 || major == nullptr || minor == nullptr) {
    return MINIDIFF_FAST_EINVALID;
  }
  name[0] = '\0';
  *major = 0;
  *minor = 0;
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return static_cast<int>(status);
  }
  std::strncpy(name, properties.name, name_size - 1);
  name[name_size - 1] = '\0';
  *major = properties.major;
  *minor = properties.minor;
  return MINIDIFF_FAST_OK;
}

extern "C" const char* minidiff_fast_cuda_error(int status) {
  if (status == MINIDIFF_FAST_EINVALID) return "an argument is null or out of range";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
