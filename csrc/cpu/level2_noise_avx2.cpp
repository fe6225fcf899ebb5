// Level-2 noise on processors with AVX2.
#define MINIDIFF_SIMD_NAMESPACE minidiff_avx2
#include "cpu/level2_noise_kernel.h"

void level2_noise::run_avx2(const Problem& problem, std::int64_t first, std::int64_t last) {
  minidiff_avx2::level2_noise::run(problem, first, last);
}
