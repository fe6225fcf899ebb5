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
#define MINIDIFF_FAST_EMEMORY (-2)  /* working memory could not be had */

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

/* broadcast_modulate: minidiff_fast/ops/broadcast_modulate.py has the formula. Everything is contiguous; x, residual,
 * y, dy and dx are float32 or bfloat16, everything else float32. A pointer is NULL where its tensor is absent or not
 * wanted. Samples go in runs of sample_run (the last one may be shorter), R = ceil(samples / sample_run) runs per
 * condition: the unit of work, so that no result depends on the number of threads. */
typedef struct minidiff_fast_modulate {
  size_t size; /* sizeof(struct minidiff_fast_modulate), checked */
  int64_t conditions, samples, tokens, channels; /* B, K, T, C */
  int64_t groups;                                /* norm 3 only; divides channels */
  int64_t sample_run;                            /* at least 1 */
  int32_t norm;            /* 0 none, 1 layer, 2 rms, 3 group */
  int32_t activation;      /* 0 none, 1 SiLU, 2 Mish */
  int32_t at_output;       /* 1: act(m n + s), 0: m act(n) + s */
  int32_t one_plus_scale;  /* 1: m = 1 + scale, 0: m = scale */
  int32_t channels_first;  /* 1: [B, K, C, T] (norm 0 and 3 only), 0: [B, K, T, C] */
  int32_t is_bfloat16;
  int32_t portable;        /* 1: only what every processor has */
  int32_t threads;         /* at least 1 */
  float eps;
  const void *x, *residual, *dy;                           /* like x */
  const float *shift, *scale, *gate;                       /* [B, C] */
  const float *own_shift, *own_scale, *own_gate;           /* [B, K, C] */
  const float *weight, *bias;                              /* [C] */
  float *mean, *rstd;                                      /* [B, K, T] or [B, K, groups]; mean not for rms */
  void *y, *dx;                                            /* like x */
  float *dshift, *dscale, *dgate, *dweight, *dbias;        /* [B, R, C]: one partial sum a run */
  float *down_shift, *down_scale, *down_gate;              /* [B, K, C] */
} minidiff_fast_modulate;

/* y, mean and rstd. */
MINIDIFF_FAST_API int minidiff_fast_modulate_forward(const minidiff_fast_modulate* arguments);

/* dx and the gradients of the parameters, from dy, x, the parameters, mean and rstd. */
MINIDIFF_FAST_API int minidiff_fast_modulate_backward(const minidiff_fast_modulate* arguments);

#ifdef __cplusplus
}
#endif

#endif /* MINIDIFF_FAST_H */
