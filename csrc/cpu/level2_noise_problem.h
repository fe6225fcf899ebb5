// The arguments of one call of Level-2 noise, as csrc/minidiff_fast.h describes them.
#ifndef MINIDIFF_FAST_CPU_LEVEL2_NOISE_PROBLEM_H
#define MINIDIFF_FAST_CPU_LEVEL2_NOISE_PROBLEM_H

#include <cstdint>

namespace level2_noise {

struct Problem {
  const float* x0;
  const float* schedule;
  std::int64_t steps;
  std::uint64_t seed;
  std::int64_t batch, samples, size, offset, total;
  int noise_at;
  bool stratified, antithetic, bfloat16_out;
  void* x;
  float* noise;
  float* target;
  void* times;
};

// Samples [first, last) of the batch * samples, with AVX2; only where minidiff_fast_runs_avx2().
void run_avx2(const Problem& problem, std::int64_t first, std::int64_t last);

}  // namespace level2_noise

#endif  // MINIDIFF_FAST_CPU_LEVEL2_NOISE_PROBLEM_H
