// Level-2 noise on the CPU: the interface of csrc/minidiff_fast.h, and the path for every processor.
#define MINIDIFF_SIMD_NAMESPACE minidiff_portable
#include "cpu/level2_noise_kernel.h"

#include "cpu/dispatch.h"
#include "minidiff_fast.h"

extern "C" int minidiff_fast_level2_noise(const float* x0, const float* schedule, int64_t steps, const int64_t* seed,
                                          int64_t batch, int64_t samples, int64_t size, int64_t offset, int64_t total,
                                          int noise_at, int stratified, int antithetic, int bfloat16_out, void* x,
                                          float* noise, float* target, void* times, int threads, int portable) {
  if (batch < 0 || samples < 0 || size < 0 || offset < 0 || total < offset + samples) return MINIDIFF_FAST_EINVALID;
  if (steps < 1 || steps > INT32_MAX || (noise_at != 0 && noise_at != 1)) return MINIDIFF_FAST_EINVALID;
  const std::int64_t rows = batch * samples;
  if (rows == 0) return MINIDIFF_FAST_OK;
  if (seed == nullptr || times == nullptr) return MINIDIFF_FAST_EINVALID;
  if (size > 0 && (x0 == nullptr || x == nullptr)) return MINIDIFF_FAST_EINVALID;
  const level2_noise::Problem problem{
      x0, schedule, steps, static_cast<std::uint64_t>(*seed), batch, samples, size, offset, total, noise_at,
      stratified != 0, antithetic != 0, bfloat16_out != 0, x, noise, target, times};
  auto* run = minidiff_portable::level2_noise::run;
#if MINIDIFF_FAST_WITH_AVX2
  if (portable == 0 && minidiff_fast_runs_avx2()) run = level2_noise::run_avx2;
#else
  (void)portable;
#endif
  // Below this a thread costs more than it brings. Every number depends on its own counter alone, so that the split
  // changes no bit.
  const std::int64_t least = 16384;
  const std::int64_t useful = std::max<std::int64_t>(1, rows * std::max<std::int64_t>(1, size) / least);
  const std::int64_t parts = std::min<std::int64_t>({std::max(threads, 1), useful, rows});
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
  for (std::int64_t part = 0; part < parts; ++part) {
    run(problem, rows * part / parts, rows * (part + 1) / parts);
  }
  return MINIDIFF_FAST_OK;
}
