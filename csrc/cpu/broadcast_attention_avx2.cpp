// Broadcast attention for processors with AVX2 and FMA; broadcast_attention.cpp chooses.
#define MINIDIFF_SIMD_NAMESPACE minidiff_avx2
#include "cpu/broadcast_attention_kernel.h"

int minidiff_fast_broadcast_attention_forward_avx2(const minidiff_fast_broadcast_attention& call) {
  using namespace MINIDIFF_SIMD_NAMESPACE;
  return call.dtype == 0 ? forward<float>(call) : forward<bfloat16>(call);
}

int minidiff_fast_broadcast_attention_backward_avx2(const minidiff_fast_broadcast_attention& call) {
  using namespace MINIDIFF_SIMD_NAMESPACE;
  return call.dtype == 0 ? backward<float>(call) : backward<bfloat16>(call);
}
