/* The C interface of libminidiff_fast_native.
 *
 * Plain C types only: raw pointers, sizes, the current stream. No torch header and no Python header, so
 * one library serves every Python and every torch. Nothing throws across this interface.
 *
 * A function that can fail returns an int status: 0 for success, a cudaError_t for a CUDA failure, a
 * negative MINIDIFF_FAST_E* for an argument it refuses.
 */
#ifndef MINIDIFF_FAST_H
#define MINIDIFF_FAST_H

#include <stddef.h>
#include <stdint.h>

/* Raised by one with every change of an existing signature; minidiff_fast/native.py holds its twin. */
#define MINIDIFF_FAST_ABI_VERSION 1

#define MINIDIFF_FAST_OK 0
#define MINIDIFF_FAST_EINVALID (-1) /* an argument is null or out of range */

#if defined(_WIN32)
#define MINIDIFF_FAST_API __declspec(dllexport)
#else
#define MINIDIFF_FAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* MINIDIFF_FAST_ABI_VERSION of the header that this library was compiled with. */
MINIDIFF_FAST_API int minidiff_fast_abi_version(void);

/* How the library was built and what this processor can do, as a JSON object (UTF-8, static storage):
 *   abi_version  int
 *   compiler     string, for example "GNU 12.2.0"
 *   openmp       bool
 *   max_threads  int, threads that a parallel region would get now; 1 without OpenMP
 *   cpu          {"architecture": string, "features": [string]}, features that CPU and OS both allow
 *   cuda         {"compiled": bool, "compiler": string or null, "architectures": [string]}
 * Touches no CUDA driver. */
MINIDIFF_FAST_API const char* minidiff_fast_build_info(void);

/* 1 if the functions below are in the library, 0 if it was compiled without CUDA and they are not. */
MINIDIFF_FAST_API int minidiff_fast_has_cuda(void);

/* CUDA versions as 1000 * major + 10 * minor. *driver is 0 where no driver is installed. */
MINIDIFF_FAST_API int minidiff_fast_cuda_versions(int* runtime, int* driver);

/* Number of devices. On a failure (no driver: cudaErrorInsufficientDriver or cudaErrorNoDevice) *count
 * is 0 and the status says why. */
MINIDIFF_FAST_API int minidiff_fast_cuda_device_count(int* count);

/* Name (at most name_size bytes with the terminating zero) and compute capability of device `index`. */
MINIDIFF_FAST_API int minidiff_fast_cuda_device(int index, char* name, size_t name_size, int* major, int* minor);

/* Text of a status that a function of this library returned; static storage. */
MINIDIFF_FAST_API const char* minidiff_fast_cuda_error(int status);

/* ---- Level-2 noise -------------------------------------------------------------------------------------------
 * Times, normals, noisy samples and targets of samples offset .. offset + samples - 1 (out of `total`) of every
 * condition, row b * samples + i; the random stream is described in minidiff_fast/ops/level2_noise.py.
 *   x0        [batch, size] float
 *   schedule  [steps] float, alphas_cumprod; null for flow matching (then steps is 2^24)
 *   seed      one int64
 *   noise_at  flow matching: the end of time that is noise, 0 or 1
 *   x         [batch * samples, size], bfloat16 (rounded to nearest even) if bfloat16_out, else float
 *   noise     [batch * samples, size] float, or null
 *   target    [batch * samples, size] float, or null: v (with a schedule) or the velocity (without)
 *   times     [batch * samples] int64 timesteps, or float in [0, 1) for flow matching
 *   threads   at most so many; the result does not depend on it
 *   portable  not 0: leave out what only some processors can do; the result does not depend on it
 * Status: 0, or MINIDIFF_FAST_EINVALID. */
MINIDIFF_FAST_API int minidiff_fast_level2_noise(const float* x0, const float* schedule, int64_t steps,
                                                 const int64_t* seed, int64_t batch, int64_t samples, int64_t size,
                                                 int64_t offset, int64_t total, int noise_at, int stratified,
                                                 int antithetic, int bfloat16_out, void* x, float* noise,
                                                 float* target, void* times, int threads, int portable);

#ifdef __cplusplus
}
#endif

#endif /* MINIDIFF_FAST_H */
