// Eight floats at a time, for every op of csrc/cpu: GCC and clang vector extensions, so that one source serves
// AVX2 (one register) and any other target (what the compiler makes of it).
//
// An op includes this from a header of its own, once per instruction set, with MINIDIFF_SIMD_NAMESPACE defined to a
// name that differs between them: two copies compiled with different flags must never be merged by the linker.
#ifndef MINIDIFF_FAST_CPU_SIMD_H
#define MINIDIFF_FAST_CPU_SIMD_H

#ifndef MINIDIFF_SIMD_NAMESPACE
#error "define MINIDIFF_SIMD_NAMESPACE before including simd.h"
#endif

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MINIDIFF_INLINE inline __attribute__((always_inline))

namespace MINIDIFF_SIMD_NAMESPACE {

typedef float V8 __attribute__((vector_size(32)));
typedef std::int32_t I8 __attribute__((vector_size(32)));  // also the result of comparing two V8: 0 or -1
typedef std::uint32_t U8 __attribute__((vector_size(32)));
typedef std::uint16_t H8 __attribute__((vector_size(16)));
typedef float UnalignedV8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef std::uint16_t UnalignedH8 __attribute__((vector_size(16), aligned(2), may_alias));

struct bfloat16 {
  std::uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ------------------------------------------------------------------------------------------------ bits and lanes

MINIDIFF_INLINE V8 broadcast(float x) { return V8{x, x, x, x, x, x, x, x}; }
MINIDIFF_INLINE V8 zero() { return V8{}; }
MINIDIFF_INLINE I8 as_int(V8 x) { return (I8)x; }
MINIDIFF_INLINE V8 as_float(I8 x) { return (V8)x; }
MINIDIFF_INLINE V8 select(I8 mask, V8 yes, V8 no) { return mask ? yes : no; }
MINIDIFF_INLINE I8 iota() { return I8{0, 1, 2, 3, 4, 5, 6, 7}; }

// The first n lanes, 0 <= n <= 8, and more of either act as the bound.
MINIDIFF_INLINE I8 first_lanes(std::int64_t n) {
  const std::int32_t count = static_cast<std::int32_t>(n < 0 ? 0 : n > 8 ? 8 : n);
  return iota() < (I8{} + count);
}

// a * b + c: rounded once where the target has the instruction, else twice.
MINIDIFF_INLINE V8 fma(V8 a, V8 b, V8 c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  V8 r;
  for (int i = 0; i < 8; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// The larger and the smaller; a NaN in b comes out, one in a does not.
MINIDIFF_INLINE V8 max(V8 a, V8 b) {
#if defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

MINIDIFF_INLINE V8 min(V8 a, V8 b) {
#if defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

MINIDIFF_INLINE V8 abs(V8 x) { return as_float(as_int(x) & 0x7fffffff); }

// Lanes in the fixed order ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
MINIDIFF_INLINE float horizontal_sum(V8 x) {
#if defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

MINIDIFF_INLINE float horizontal_max(V8 x) {
  float r = x[0];
  for (int i = 1; i < 8; ++i) r = x[i] > r ? x[i] : r;
  return r;
}

// In place: lane j of vector i becomes lane i of vector j.
MINIDIFF_INLINE void transpose(V8 (&r)[8]) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#else
  V8 t[8];
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) t[i][j] = r[j][i];
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
#endif
}

// ------------------------------------------------------------------------------------------------- loads, stores

// float32 and bfloat16 memory, any alignment; arithmetic is float32. Stores to bfloat16 round to nearest even.

MINIDIFF_INLINE float to_float(float x) { return x; }
MINIDIFF_INLINE float to_float(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

MINIDIFF_INLINE void from_float(float x, float* to) { *to = x; }
MINIDIFF_INLINE void from_float(float x, bfloat16* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // A NaN stays one: rounding could carry it to infinity.
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

MINIDIFF_INLINE V8 load(const float* p) { return *reinterpret_cast<const UnalignedV8*>(p); }
MINIDIFF_INLINE V8 load(const bfloat16* p) {
  const H8 half = *reinterpret_cast<const UnalignedH8*>(p);
#if defined(__AVX2__)
  return (V8)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (V8)(__builtin_convertvector(half, U8) << 16);
#endif
}

MINIDIFF_INLINE void store(float* p, V8 x) { *reinterpret_cast<UnalignedV8*>(p) = x; }
MINIDIFF_INLINE void store(bfloat16* p, V8 x) {
  const U8 bits = (U8)x;
  const U8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U8 nan = (bits >> 16) | 0x40u;
  const U8 chosen = (x == x) ? rounded : nan;
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);
  *reinterpret_cast<UnalignedH8*>(p) = (H8)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  *reinterpret_cast<UnalignedH8*>(p) = __builtin_convertvector(chosen, H8);
#endif
}

// The first n elements, 0 <= n <= 8; nothing behind them is touched, and a load gives 0 there.
MINIDIFF_INLINE V8 load_partial(const float* p, std::int64_t n) {
#if defined(__AVX2__)
  return _mm256_maskload_ps(p, (__m256i)first_lanes(n));
#else
  float t[8] = {};
  for (std::int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
#endif
}

MINIDIFF_INLINE V8 load_partial(const bfloat16* p, std::int64_t n) {
  bfloat16 t[8] = {};
  for (std::int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}

MINIDIFF_INLINE void store_partial(float* p, V8 x, std::int64_t n) {
#if defined(__AVX2__)
  // In pieces: masked stores are slow on some processors.
  if (n >= 8) return store(p, x);
  __m128 half = _mm256_castps256_ps128(x);
  if (n & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps(x, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, half);
#else
  for (std::int64_t i = 0; i < n; ++i) p[i] = x[i];
#endif
}

MINIDIFF_INLINE void store_partial(bfloat16* p, V8 x, std::int64_t n) {
  bfloat16 t[8];
  store(t, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = t[i];
}

// --------------------------------------------------------------------------------------------------- functions

// Powers of two as floats, n in [-126, 127]; 0 for -127.
MINIDIFF_INLINE V8 power_of_two(I8 n) { return as_float((n + 127) << 23); }

// x = n ln 2 + r, |r| <= ln 2 / 2: e^r, and n. For |x| < 2^21.
MINIDIFF_INLINE V8 exp_reduced(V8 x, I8* n) {
  const V8 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V8 shifted = fma(x, broadcast(1.44269504f), magic);
  const V8 count = shifted - magic;
  *n = as_int(shifted) - as_int(magic);
  V8 r = fma(count, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first of ten bits
  r = fma(count, broadcast(2.12194440e-4f), r);
  V8 p = broadcast(1.98756915e-4f);
  p = fma(p, r, broadcast(1.39819995e-3f));
  p = fma(p, r, broadcast(8.33345191e-3f));
  p = fma(p, r, broadcast(4.16657959e-2f));
  p = fma(p, r, broadcast(1.66666655e-1f));
  p = fma(p, r, broadcast(5.00000012e-1f));
  return fma(p * r, r, r) + 1.0f;
}

// e^x within one unit in the last place, subnormal results included; 0 for -inf, inf for inf, NaN for NaN.
MINIDIFF_INLINE V8 exp(V8 x) {
  I8 n;
  const V8 p = exp_reduced(min(broadcast(89.0f), max(broadcast(-104.0f), x)), &n);
  const I8 half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

// e^x for x < 88, a softmax weight: as exp, but 0 below e^-87.7, about the least normal number.
MINIDIFF_INLINE V8 exp_weight(V8 x) {
  I8 n;
  const V8 p = exp_reduced(max(broadcast(-88.0f), x), &n);
  return p * power_of_two(n);  // n = -127, what -88 gives, makes the factor 0
}

// ln x for positive normal x, within one unit in the last place.
MINIDIFF_INLINE V8 log(V8 x) {
  // x = 2^n m, m in [sqrt(1/2), sqrt(2)).
  const I8 shifted = as_int(x) - 0x3f3504f3;
  const I8 n = shifted >> 23;
  const V8 f = as_float((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const V8 square = f * f;
  V8 p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  const V8 count = __builtin_convertvector(n, V8);
  V8 tail = fma(p * f, square, count * -2.12194440e-4f);
  tail = fma(square, broadcast(-0.5f), tail);
  return fma(count, broadcast(0.693359375f), f + tail);
}

// 1 / (1 + e^-x), accurate relative to itself on both sides.
MINIDIFF_INLINE V8 sigmoid(V8 x) {
  const V8 e = exp(-abs(x));
  return select(x < 0.0f, e, broadcast(1.0f)) / (1.0f + e);
}

MINIDIFF_INLINE V8 silu(V8 x) { return x * sigmoid(x); }

MINIDIFF_INLINE V8 silu_gradient(V8 x) {
  const V8 s = sigmoid(x);
  return s * fma(x, sigmoid(-x), broadcast(1.0f));
}

// x tanh(ln(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2); beyond 20 the quotient is 1 and e^2x is not needed.
MINIDIFF_INLINE V8 mish(V8 x) {
  const V8 e = exp(min(broadcast(20.0f), x));
  const V8 n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// n / (n + 2) + x 4 e (e + 1) / (n + 2)^2
MINIDIFF_INLINE V8 mish_gradient(V8 x) {
  const V8 bounded = min(broadcast(20.0f), x);
  const V8 e = exp(bounded);
  const V8 n = e * (e + 2.0f);
  const V8 inverse = 1.0f / (n + 2.0f);
  return fma(bounded * (4.0f * e), (e + 1.0f) * inverse * inverse, n * inverse);
}

}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_SIMD_H
