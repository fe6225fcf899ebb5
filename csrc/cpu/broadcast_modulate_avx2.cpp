// broadcast_modulate for processors with AVX2 and FMA.
#define MINIDIFF_SIMD_NAMESPACE minidiff_fast_broadcast_modulate_avx2_simd
#include "broadcast_modulate_kernel.h"

int minidiff_fast_broadcast_modulate_avx2(const minidiff_fast_broadcast_modulate& arguments, bool backward) {
  return MINIDIFF_SIMD_NAMESPACE::broadcast_modulate(arguments, backward);
}
