// Level-2 noise for one instruction set: see csrc/minidiff_fast.h for the interface, minidiff_fast/ops/level2_noise.py
// for the counters of the random stream and minidiff_fast/ops/box_muller.py for the arithmetic of the normals, which
// is repeated here operation by operation: same bits. Plain loops over a batch of Philox counters, which compilers turn
// into vectors; nothing may be fused (CMakeLists.txt: -ffp-contract=off), and sqrt is correctly rounded everywhere.
#ifndef MINIDIFF_SIMD_NAMESPACE
#error "define MINIDIFF_SIMD_NAMESPACE before including level2_noise_kernel.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/level2_noise_problem.h"
#include "cpu/simd.h"

namespace MINIDIFF_SIMD_NAMESPACE {
namespace level2_noise {

using ::level2_noise::Problem;

constexpr int kLanes = 128;  // counters of a batch: 512 normals, all of it within the first-level cache

struct Batch {
  std::uint32_t counter[3][kLanes];  // block, sample low, sample high; the first three words when done
  std::uint32_t tag[kLanes];         // the fourth
  float normal[4 * kLanes];
};

MINIDIFF_INLINE void philox(Batch& batch, std::uint64_t seed, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    std::uint32_t c0 = batch.counter[0][i], c1 = batch.counter[1][i], c2 = batch.counter[2][i], c3 = batch.tag[i];
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
      const std::uint64_t p1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    batch.counter[0][i] = c0, batch.counter[1][i] = c1, batch.counter[2][i] = c2, batch.tag[i] = c3;
  }
}

// The float nearest to a word: both halves and the first product are exact, the sum rounds once.
MINIDIFF_INLINE float nearest(std::uint32_t word) {
  return static_cast<float>(static_cast<std::int32_t>(word >> 16)) * 65536.0f +
         static_cast<float>(static_cast<std::int32_t>(word & 0xFFFFu));
}

MINIDIFF_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MINIDIFF_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MINIDIFF_INLINE float radius(std::uint32_t word) {
  const bool near_one = word < 1257966796u;
  const std::uint32_t bits = bits_of(nearest(0u - word));
  std::int32_t exponent = static_cast<std::int32_t>(bits >> 23) - 159;
  float mantissa = float_of((bits & 0x7FFFFFu) | 0x3F800000u);
  const bool high = mantissa > 1.41421354f;
  mantissa = high ? mantissa * 0.5f : mantissa;
  exponent = high ? exponent + 1 : exponent;
  const float power = static_cast<float>(near_one ? 0 : exponent);
  const float f = near_one ? nearest(word) * -0x1p-32f : mantissa - 1.0f;
  const float square = f * f;
  float p = -0.076344974f * f + 0.12761578f;
  p = p * f + -0.131601825f;
  p = p * f + 0.142017573f;
  p = p * f + -0.16623357f;
  p = p * f + 0.200012267f;
  p = p * f + -0.250008196f;
  p = p * f + 0.333333313f;
  float log = square * f * p;
  log = log + power * -2.12194442e-4f;
  log = log - square * 0.5f;
  log = log + f;
  log = log + power * 0.693359375f;
  return std::sqrt(log * -2.0f);
}

MINIDIFF_INLINE void normals(std::uint32_t first, std::uint32_t second, float* x, float* y) {
  const float r = radius(first);
  const std::uint32_t quarter = (second + 0x20000000u) >> 30;
  const float g = static_cast<float>(static_cast<std::int32_t>(second - (quarter << 30))) * 1.46291812e-9f;
  const float square = g * g;
  float p = -1.9515284e-4f * square + 8.33216e-3f;
  p = p * square + -0.16666655f;
  const float sin = square * g * p + g;
  p = 2.4438452e-5f * square + -1.3887368e-3f;
  p = p * square + 4.1666646e-2f;
  const float cos = square * square * p - square * 0.5f + 1.0f;
  const bool odd = (quarter & 1u) != 0;
  const std::uint32_t flip_x = ((quarter + 1u) & 2u) << 30, flip_y = (quarter & 2u) << 30;
  *x = r * float_of(bits_of(odd ? sin : cos) ^ flip_x);
  *y = r * float_of(bits_of(odd ? cos : sin) ^ flip_y);
}

MINIDIFF_INLINE void box_muller(Batch& batch, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    float* to = batch.normal + 4 * i;
    normals(batch.counter[0][i], batch.counter[1][i], to, to + 1);
    normals(batch.counter[2][i], batch.tag[i], to + 2, to + 3);
  }
}

// The integer time of a sample, in [0, steps).
MINIDIFF_INLINE std::int64_t draw_time(const Problem& p, std::uint64_t sample, std::int64_t k, Batch& batch) {
  batch.counter[0][0] = 0;
  batch.counter[1][0] = static_cast<std::uint32_t>(sample);
  batch.counter[2][0] = static_cast<std::uint32_t>(sample >> 32);
  batch.tag[0] = 1;
  philox(batch, p.seed, 1);
  const std::int64_t scaled = static_cast<std::int64_t>((batch.counter[0][0] * static_cast<std::uint64_t>(p.steps)) >> 32);
  return p.stratified ? (k * p.steps + scaled) / p.total : scaled;
}

struct Levels {
  float signal, spread;
};

MINIDIFF_INLINE Levels write_time(const Problem& p, std::int64_t row, std::int64_t index) {
  if (p.schedule == nullptr) {
    const float time = static_cast<float>(static_cast<std::int32_t>(index)) * 0x1p-24f;
    static_cast<float*>(p.times)[row] = time;
    const float spread = p.noise_at == 1 ? time : 1.0f - time;
    return {1.0f - spread, spread};
  }
  static_cast<std::int64_t*>(p.times)[row] = index;
  const float share = p.schedule[index];
  return {std::sqrt(share > 0.0f ? share : 0.0f), std::sqrt(1.0f - share)};
}

// Elements [begin, end) of one sample; normal[0] belongs to `begin`.
template <typename Out>
MINIDIFF_INLINE void write_elements(const Problem& p, std::int64_t row, std::int64_t b, Levels levels, bool negate,
                                    std::int64_t begin, std::int64_t end, float* normal) {
  const std::int64_t count = end - begin;
  const float* clean = p.x0 + b * p.size + begin;
  if (negate) {
    for (std::int64_t i = 0; i < count; ++i) normal[i] = -normal[i];
  }
  Out* x = static_cast<Out*>(p.x) + row * p.size + begin;
  for (std::int64_t i = 0; i < count; ++i) from_float(levels.signal * clean[i] + levels.spread * normal[i], x + i);
  if (p.noise != nullptr) std::memcpy(p.noise + row * p.size + begin, normal, sizeof(float) * count);
  if (p.target == nullptr) return;
  float* target = p.target + row * p.size + begin;
  if (p.schedule != nullptr) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = levels.signal * normal[i] - levels.spread * clean[i];
  } else if (p.noise_at == 1) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = normal[i] - clean[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) target[i] = clean[i] - normal[i];
  }
}

// Samples [first, last) of the B * K: batches of counters run over the ends of samples, so that short ones fill them.
template <typename Out>
void run_rows(const Problem& p, std::int64_t first, std::int64_t last) {
  Batch batch;
  const std::int64_t blocks = (p.size + 3) / 4;
  const auto sample_of = [&p](std::int64_t row, std::int64_t* b, std::int64_t* k) {
    *b = row / p.samples;
    *k = p.offset + row % p.samples;
    return static_cast<std::uint64_t>(*b) * p.total + *k;
  };
  Levels levels{};
  std::int64_t b, k;
  if (blocks == 0) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::uint64_t sample = sample_of(row, &b, &k);
      write_time(p, row, draw_time(p, sample, k, batch));
    }
    return;
  }
  std::int64_t row = first, block = 0;  // the next counter
  while (row < last) {
    const std::int64_t start_row = row, start_block = block;
    int lanes = 0;
    while (lanes < kLanes && row < last) {
      std::uint64_t source = sample_of(row, &b, &k);
      if (p.antithetic) source -= static_cast<std::uint64_t>(k & 1);
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes - lanes, blocks - block));
      for (int i = 0; i < count; ++i) {
        batch.counter[0][lanes + i] = static_cast<std::uint32_t>(block + i);
        batch.counter[1][lanes + i] = static_cast<std::uint32_t>(source);
        batch.counter[2][lanes + i] = static_cast<std::uint32_t>(source >> 32);
        batch.tag[lanes + i] = 2;
      }
      lanes += count;
      block += count;
      if (block == blocks) ++row, block = 0;
    }
    // A multiple of eight, so that no lane is left to scalar code.
    const int padded = (lanes + 7) / 8 * 8;
    for (int i = lanes; i < padded; ++i) {
      for (auto& words : batch.counter) words[i] = 0;
      batch.tag[i] = 0;
    }
    philox(batch, p.seed, padded);
    box_muller(batch, padded);
    std::int64_t done = 0;
    for (std::int64_t r = start_row, q = start_block; done < lanes; ++r, q = 0) {
      const std::uint64_t sample = sample_of(r, &b, &k);
      if (q == 0) levels = write_time(p, r, draw_time(p, sample, k, batch));
      const std::int64_t count = std::min<std::int64_t>(lanes - done, blocks - q);
      const std::int64_t end = std::min(p.size, 4 * (q + count));
      write_elements<Out>(p, r, b, levels, p.antithetic && (k & 1), 4 * q, end, batch.normal + 4 * done);
      done += count;
    }
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
