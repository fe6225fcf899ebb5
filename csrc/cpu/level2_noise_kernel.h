// Level-2 noise for one instruction set: see csrc/minidiff_fast.h for the interface, minidiff_fast/ops/level2_noise.py
// for the counters of the random stream and minidiff_fast/ops/box_muller.py for the arithmetic of the normals, which
// is repeated here operation by operation: same bits. Nothing may be fused (CMakeLists.txt: -ffp-contract=off), and
// square roots are correctly rounded everywhere.
#ifndef MINIDIFF_SIMD_NAMESPACE
#error "define MINIDIFF_SIMD_NAMESPACE before including level2_noise_kernel.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/level2_noise_problem.h"
#include "cpu/simd.h"

namespace MINIDIFF_SIMD_NAMESPACE {
namespace level2_noise {

using ::level2_noise::Problem;

constexpr int kLanes = 128;  // counters of a batch: 512 normals, all of it within the first-level cache

struct Batch {
  std::uint32_t word[4][kLanes];  // counters, then what Philox makes of them
  float normal[4 * kLanes];
};

constexpr std::uint32_t kRound0 = 0xD2511F53u, kRound1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

#if defined(__AVX2__)
// High and low words of factor * x.
MINIDIFF_INLINE void multiply(__m256i factor, __m256i x, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

MINIDIFF_INLINE __m256i load_lanes(const std::uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MINIDIFF_INLINE void store_lanes(std::uint32_t* p, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
#endif

// Ten rounds on the counters (c0, c1, c2, c3)[i], in place; `lanes` is a multiple of eight.
MINIDIFF_INLINE void philox(std::uint64_t seed, std::uint32_t* __restrict c0, std::uint32_t* __restrict c1,
                            std::uint32_t* __restrict c2, std::uint32_t* __restrict c3, int lanes) {
#if defined(__AVX2__)
  const __m256i factor0 = _mm256_set1_epi32(static_cast<int>(kRound0));
  const __m256i factor1 = _mm256_set1_epi32(static_cast<int>(kRound1));
  for (int i = 0; i < lanes; i += 8) {
    __m256i w0 = load_lanes(c0 + i), w1 = load_lanes(c1 + i), w2 = load_lanes(c2 + i), w3 = load_lanes(c3 + i);
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      __m256i high0, low0, high1, low1;
      multiply(factor0, w0, &high0, &low0);
      multiply(factor1, w2, &high1, &low1);
      w0 = _mm256_xor_si256(_mm256_xor_si256(high1, w1), _mm256_set1_epi32(static_cast<int>(k0)));
      w2 = _mm256_xor_si256(_mm256_xor_si256(high0, w3), _mm256_set1_epi32(static_cast<int>(k1)));
      w1 = low1, w3 = low0;
      k0 += kWeyl0, k1 += kWeyl1;
    }
    store_lanes(c0 + i, w0), store_lanes(c1 + i, w1), store_lanes(c2 + i, w2), store_lanes(c3 + i, w3);
  }
#else
  for (int i = 0; i < lanes; ++i) {  // a plain loop: compilers know the widening product
    std::uint32_t w0 = c0[i], w1 = c1[i], w2 = c2[i], w3 = c3[i];
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = static_cast<std::uint64_t>(w0) * kRound0;
      const std::uint64_t p1 = static_cast<std::uint64_t>(w2) * kRound1;
      w0 = static_cast<std::uint32_t>(p1 >> 32) ^ w1 ^ k0;
      w1 = static_cast<std::uint32_t>(p1);
      w2 = static_cast<std::uint32_t>(p0 >> 32) ^ w3 ^ k1;
      w3 = static_cast<std::uint32_t>(p0);
      k0 += kWeyl0, k1 += kWeyl1;
    }
    c0[i] = w0, c1[i] = w1, c2[i] = w2, c3[i] = w3;
  }
#endif
}

MINIDIFF_INLINE V8 convert(I8 x) { return __builtin_convertvector(x, V8); }

// The floats nearest to the words: both halves and the first product are exact, the sum rounds once.
MINIDIFF_INLINE V8 nearest(U8 word) { return convert((I8)(word >> 16)) * 65536.0f + convert((I8)(word & 0xFFFFu)); }

MINIDIFF_INLINE V8 square_root(V8 x) {
#if defined(__AVX2__)
  return (V8)_mm256_sqrt_ps((__m256)x);
#else
  V8 root;
  for (int i = 0; i < 8; ++i) root[i] = std::sqrt(x[i]);
  return root;
#endif
}

MINIDIFF_INLINE V8 radius(U8 word) {
  const I8 near_one = word < 1257966796u;
  const I8 bits = as_int(nearest(-word));
  const V8 whole = as_float((bits & 0x7FFFFF) | 0x3F800000);
  const I8 high = whole > 1.41421354f;
  const V8 mantissa = select(high, whole * 0.5f, whole);
  const I8 exponent = (bits >> 23) - 159 - high;
  const V8 power = convert(exponent & ~near_one);
  const V8 f = select(near_one, nearest(word) * -0x1p-32f, mantissa - 1.0f);
  const V8 square = f * f;
  V8 p = -0.076344974f * f + 0.12761578f;
  p = p * f + -0.131601825f;
  p = p * f + 0.142017573f;
  p = p * f + -0.16623357f;
  p = p * f + 0.200012267f;
  p = p * f + -0.250008196f;
  p = p * f + 0.333333313f;
  V8 log = square * f * p;
  log = log + power * -2.12194442e-4f;
  log = log - square * 0.5f;
  log = log + f;
  log = log + power * 0.693359375f;
  return square_root(log * -2.0f);
}

MINIDIFF_INLINE void normals(const U8& first, const U8& second, V8* x, V8* y) {
  const V8 r = radius(first);
  const U8 quarter = (second + 0x20000000u) >> 30;
  const V8 g = convert((I8)(second - (quarter << 30))) * 1.46291812e-9f;
  const V8 square = g * g;
  V8 p = -1.9515284e-4f * square + 8.33216e-3f;
  p = p * square + -0.16666655f;
  const V8 sin = square * g * p + g;
  p = 2.4438452e-5f * square + -1.3887368e-3f;
  p = p * square + 4.1666646e-2f;
  const V8 cos = square * square * p - square * 0.5f + 1.0f;
  const I8 odd = -(I8)(quarter & 1u);
  const U8 flip_x = ((quarter + 1u) & 2u) << 30, flip_y = (quarter & 2u) << 30;
  *x = r * as_float((I8)((U8)as_int(select(odd, sin, cos)) ^ flip_x));
  *y = r * as_float((I8)((U8)as_int(select(odd, cos, sin)) ^ flip_y));
}

// Four vectors of eight, z_j of counter i, to the order 4 i + j.
MINIDIFF_INLINE void store_interleaved(float* to, V8 z0, V8 z1, V8 z2, V8 z3) {
#if defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)z0, (__m256)z1), b = _mm256_unpackhi_ps((__m256)z0, (__m256)z1);
  const __m256 c = _mm256_unpacklo_ps((__m256)z2, (__m256)z3), d = _mm256_unpackhi_ps((__m256)z2, (__m256)z3);
  const __m256d ac = (__m256d)_mm256_shuffle_ps(a, c, 0x44), ca = (__m256d)_mm256_shuffle_ps(a, c, 0xEE);
  const __m256d bd = (__m256d)_mm256_shuffle_ps(b, d, 0x44), db = (__m256d)_mm256_shuffle_ps(b, d, 0xEE);
  store(to, (V8)_mm256_permute2f128_pd(ac, ca, 0x20));
  store(to + 8, (V8)_mm256_permute2f128_pd(bd, db, 0x20));
  store(to + 16, (V8)_mm256_permute2f128_pd(ac, ca, 0x31));
  store(to + 24, (V8)_mm256_permute2f128_pd(bd, db, 0x31));
#else
  for (int i = 0; i < 8; ++i) to[4 * i] = z0[i], to[4 * i + 1] = z1[i], to[4 * i + 2] = z2[i], to[4 * i + 3] = z3[i];
#endif
}

MINIDIFF_INLINE U8 load_words(const std::uint32_t* p) {
  U8 words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// The normals of `lanes` counters, a multiple of eight.
MINIDIFF_INLINE void fill(Batch& batch, std::uint64_t seed, int lanes) {
  philox(seed, batch.word[0], batch.word[1], batch.word[2], batch.word[3], lanes);
  for (int i = 0; i < lanes; i += 8) {
    V8 z0, z1, z2, z3;
    normals(load_words(batch.word[0] + i), load_words(batch.word[1] + i), &z0, &z1);
    normals(load_words(batch.word[2] + i), load_words(batch.word[3] + i), &z2, &z3);
    store_interleaved(batch.normal + 4 * i, z0, z1, z2, z3);
  }
}

// A sample and the number that its counters hold; walks from row to row without a division.
struct Sample {
  std::int64_t b, i;  // condition, place among the samples of this call
  std::uint64_t number;

  Sample(const Problem& p, std::int64_t row)
      : b(row / p.samples), i(row % p.samples), number(static_cast<std::uint64_t>(b) * p.total + k(p)) {}
  MINIDIFF_INLINE std::int64_t k(const Problem& p) const { return p.offset + i; }
  MINIDIFF_INLINE void next(const Problem& p) {
    ++number;
    if (++i == p.samples) ++b, i = 0, number += static_cast<std::uint64_t>(p.total - p.samples);
  }
};

struct Levels {
  float signal, spread;
};

// Times of samples one after the other, drawn many at once, and what they weigh data and noise with.
class Times {
 public:
  // Row by row, no row left out; writes the row's time.
  MINIDIFF_INLINE Levels at(const Problem& p, std::int64_t row, const Sample& sample) {
    if (row >= first_ + kLanes) draw(p, row, sample);
    const std::int64_t i = row - first_;
    if (p.schedule == nullptr) {
      static_cast<float*>(p.times)[row] = static_cast<float>(index_[i]) * 0x1p-24f;
    } else {
      static_cast<std::int64_t*>(p.times)[row] = index_[i];
    }
    return {signal_[i], spread_[i]};
  }

 private:
  void draw(const Problem& p, std::int64_t row, Sample sample) {
    std::int64_t k[kLanes];
    for (int i = 0; i < kLanes; ++i, sample.next(p)) {
      const std::uint64_t number = sample.number;
      k[i] = sample.k(p);
      word_[0][i] = 0;
      word_[1][i] = static_cast<std::uint32_t>(number);
      word_[2][i] = static_cast<std::uint32_t>(number >> 32);
      word_[3][i] = 1;
    }
    philox(p.seed, word_[0], word_[1], word_[2], word_[3], kLanes);
    const std::uint64_t steps = static_cast<std::uint64_t>(p.steps);
    for (int i = 0; i < kLanes; ++i) index_[i] = static_cast<std::int32_t>((word_[0][i] * steps) >> 32);
    if (p.stratified) {
      for (int i = 0; i < kLanes; ++i) index_[i] = static_cast<std::int32_t>((k[i] * p.steps + index_[i]) / p.total);
    }
    if (p.schedule == nullptr) {
      for (int i = 0; i < kLanes; ++i) {
        const float time = static_cast<float>(index_[i]) * 0x1p-24f;
        spread_[i] = p.noise_at == 1 ? time : 1.0f - time;
        signal_[i] = 1.0f - spread_[i];
      }
    } else {
      for (int i = 0; i < kLanes; ++i) signal_[i] = p.schedule[index_[i]];
      for (int i = 0; i < kLanes; ++i) spread_[i] = std::sqrt(1.0f - signal_[i]);
      for (int i = 0; i < kLanes; ++i) signal_[i] = std::sqrt(signal_[i] > 0.0f ? signal_[i] : 0.0f);
    }
    first_ = row;
  }

  std::int64_t first_ = -kLanes;
  std::uint32_t word_[4][kLanes];
  std::int32_t index_[kLanes];
  float signal_[kLanes], spread_[kLanes];
};

// `count` elements of one sample from `begin` on; normal[0] belongs to `begin`. A count that the compiler knows leaves
// no loop.
template <typename Out, typename Count>
MINIDIFF_INLINE void write_some(const Problem& p, std::int64_t row, std::int64_t b, Levels levels, bool negate,
                                std::int64_t begin, Count count, float* normal) {
  const float* clean = p.x0 + b * p.size + begin;
  const std::int64_t to = row * p.size + begin;
  const float sign = negate ? -1.0f : 1.0f;
  for (std::int64_t i = 0; i < count; ++i) normal[i] *= sign;
  Out* x = static_cast<Out*>(p.x) + to;
  for (std::int64_t i = 0; i < count; ++i) from_float(levels.signal * clean[i] + levels.spread * normal[i], x + i);
  if (p.noise != nullptr) {
    for (std::int64_t i = 0; i < count; ++i) p.noise[to + i] = normal[i];
  }
  if (p.target == nullptr) return;
  float* target = p.target + to;
  if (p.schedule != nullptr) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = levels.signal * normal[i] - levels.spread * clean[i];
  } else if (p.noise_at == 1) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = normal[i] - clean[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) target[i] = clean[i] - normal[i];
  }
}

template <int N>
using Known = std::integral_constant<std::int64_t, N>;

template <typename Out>
MINIDIFF_INLINE void write_elements(const Problem& p, std::int64_t row, std::int64_t b, Levels levels, bool negate,
                                    std::int64_t begin, std::int64_t end, float* normal) {
  switch (end - begin) {  // one pose, one gripper: samples of a few numbers are common
    case 1: return write_some<Out>(p, row, b, levels, negate, begin, Known<1>(), normal);
    case 2: return write_some<Out>(p, row, b, levels, negate, begin, Known<2>(), normal);
    case 3: return write_some<Out>(p, row, b, levels, negate, begin, Known<3>(), normal);
    case 4: return write_some<Out>(p, row, b, levels, negate, begin, Known<4>(), normal);
    default: return write_some<Out>(p, row, b, levels, negate, begin, end - begin, normal);
  }
}

// Samples [first, last) of the B * K: batches of counters run over the ends of samples, so that short ones fill them.
template <typename Out>
void run_rows(const Problem& p, std::int64_t first, std::int64_t last) {
  const std::int64_t blocks = (p.size + 3) / 4;
  Times times;
  Batch batch;
  Levels levels{};
  Sample drawn(p, first), written(p, first);
  std::int64_t row = first, block = 0;  // of `written`
  if (blocks == 0) {
    for (; row < last; ++row, written.next(p)) times.at(p, row, written);
    return;
  }
  for (std::int64_t left = (last - first) * blocks, next = 0; left > 0;) {
    const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, left));
    const int padded = (lanes + 7) / 8 * 8;
    for (int i = 0; i < padded; ++i) {
      const std::uint64_t odd = p.antithetic ? static_cast<std::uint64_t>(drawn.k(p) & 1) : 0;
      const std::uint64_t source = drawn.number - odd;
      batch.word[0][i] = static_cast<std::uint32_t>(next);
      batch.word[1][i] = static_cast<std::uint32_t>(source);
      batch.word[2][i] = static_cast<std::uint32_t>(source >> 32);
      batch.word[3][i] = 2;
      if (++next == blocks) drawn.next(p), next = 0;
    }
    fill(batch, p.seed, padded);
    for (std::int64_t done = 0; done < lanes;) {
      if (block == 0) levels = times.at(p, row, written);
      const std::int64_t count = std::min<std::int64_t>(lanes - done, blocks - block);
      const std::int64_t end = std::min(p.size, 4 * (block + count));
      const bool negate = p.antithetic && (written.k(p) & 1) != 0;
      write_elements<Out>(p, row, written.b, levels, negate, 4 * block, end, batch.normal + 4 * done);
      done += count;
      block += count;
      if (block == blocks) ++row, written.next(p), block = 0;
    }
    left -= lanes;
  }
}

inline void run(const Problem& p, std::int64_t first, std::int64_t last) {
  if (p.bfloat16_out) {
    run_rows<bfloat16>(p, first, last);
  } else {
    run_rows<float>(p, first, last);
  }
}

}  // namespace level2_noise
}  // namespace MINIDIFF_SIMD_NAMESPACE
