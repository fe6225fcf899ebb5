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
#define MINIDIFF_FAST_ENOMEM (-2)   /* no memory for the work space */

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

/* Broadcast attention on the CPU (minidiff_fast/ops/broadcast_attention.py is its definition).
 *
 * Strides are in elements. Everything without strides is contiguous. Every member has 8 bytes. */
typedef struct minidiff_fast_broadcast_attention {
  int64_t size;     /* sizeof this structure: both sides must mean the same */
  int64_t dtype;    /* of q, k, v, own_k, own_v, out, dout and the gradients: 0 float32, 1 bfloat16 */
  int64_t threads;  /* results are the same bits for the same number of threads */
  int64_t portable; /* nonzero: no instructions that only some processors have */
  int64_t batch, samples, tokens, heads, kv_heads, width; /* B, K, T, H, Hkv, D */
  int64_t shared;   /* S; with cu_seqlens: tokens in all */
  int64_t own;      /* P */
  int64_t own_causal;
  int64_t own_column; /* dropout's column of own key 0 */
  int64_t dropout_threshold;
  double scale, keep_scale; /* factor on logits; 1 / (1 - dropout_p) */
  const int64_t* seed;      /* null: no dropout */
  const void* q;            /* [B, K, T, H, D] */
  const void* k;            /* [B, S, Hkv, D]; with cu_seqlens [N, Hkv, D] and k_strides[0] == 0 */
  const void* v;
  const void* own_k; /* [B, K, P, Hkv, D], or null */
  const void* own_v;
  const void* lengths; /* [B], or null */
  int64_t lengths_size; /* bytes of one length: 4 or 8 */
  const int32_t* cu_seqlens; /* [B + 1], or null */
  const unsigned char* mask; /* [B, T, S], strides 0 where it broadcasts, or null */
  int64_t q_strides[5], k_strides[4], v_strides[4], own_k_strides[5], own_v_strides[5], mask_strides[3];
  void* out;             /* [B, K, T, H, D]: written by forward, read by backward */
  float* lse;            /* [B, K, T, H]: likewise */
  float* lse_correction; /* [B, K, T, H], or null: likewise */
  const void* dout;      /* [B, K, T, H, D] */
  int64_t dout_strides[5];
  const float* dlse; /* [B, K, T, H] */
  void* dq;          /* the gradients, each like its tensor, or null where it is not wanted (both of a pair) */
  void* dk;
  void* dv;
  void* down_k;
  void* down_v;
} minidiff_fast_broadcast_attention;

MINIDIFF_FAST_API int minidiff_fast_broadcast_attention_forward(const minidiff_fast_broadcast_attention* call);
MINIDIFF_FAST_API int minidiff_fast_broadcast_attention_backward(const minidiff_fast_broadcast_attention* call);
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

/* broadcast_modulate: minidiff_fast/ops/broadcast_modulate.py has the formula. Everything is contiguous; x, residual,
 * y, dy and dx are float32 or bfloat16, everything else float32. A pointer is NULL where its tensor is absent or not
 * wanted. Samples go in runs of sample_run (the last one may be shorter), R = ceil(samples / sample_run) runs per
 * condition: the unit of work, so that no result depends on the number of threads. */
typedef struct minidiff_fast_broadcast_modulate {
  size_t size; /* sizeof(struct minidiff_fast_broadcast_modulate), checked */
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
} minidiff_fast_broadcast_modulate;

/* y, mean and rstd. */
MINIDIFF_FAST_API int minidiff_fast_broadcast_modulate_forward(const minidiff_fast_broadcast_modulate* arguments);

/* dx and the gradients of the parameters, from dy, x, the parameters, mean and rstd. */
MINIDIFF_FAST_API int minidiff_fast_broadcast_modulate_backward(const minidiff_fast_broadcast_modulate* arguments);

#ifdef __cplusplus
}
#endif

#endif /* MINIDIFF_FAST_H */
