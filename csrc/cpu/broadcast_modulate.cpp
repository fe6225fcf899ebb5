// broadcast_modulate: the C interface, and the kernels for any processor.
#define MINIDIFF_SIMD_NAMESPACE minidiff_fast_broadcast_modulate_portable_simd
#include "broadcast_modulate_kernel.h"
#include "dispatch.h"

#if MINIDIFF_FAST_WITH_AVX2
int minidiff_fast_broadcast_modulate_avx2(const minidiff_fast_broadcast_modulate& arguments, bool backward);
#endif

namespace {

bool sound(const minidiff_fast_broadcast_modulate* a, bool backward) {
  if (a == nullptr || a->size != sizeof(minidiff_fast_broadcast_modulate)) return false;
  if (a->conditions < 0 || a->samples < 0 || a->tokens < 0 || a->channels < 1) return false;
  if (a->sample_run < 1 || a->threads < 1) return false;
  if (a->norm < 0 || a->norm > 3 || a->activation < 0 || a->activation > 2) return false;
  if (a->norm == 3 && (a->groups < 1 || a->channels % a->groups != 0)) return false;
  if (a->channels_first && (a->norm == 1 || a->norm == 2)) return false;
  // Empty tensors have no address; the sums over no sample or no token are still written.
  if (a->conditions == 0 || a->samples == 0 || a->tokens == 0) return true;
  if (a->x == nullptr || (backward ? a->dy : a->y) == nullptr) return false;
  if (a->norm != 0 && a->rstd == nullptr) return false;
  return a->norm == 0 || a->norm == 2 || a->mean != nullptr;
}

int run(const minidiff_fast_broadcast_modulate* a, bool backward) {
  if (!sound(a, backward)) return MINIDIFF_FAST_EINVALID;
#if MINIDIFF_FAST_WITH_AVX2
  if (!a->portable && minidiff_fast_runs_avx2()) return minidiff_fast_broadcast_modulate_avx2(*a, backward);
#endif
  return MINIDIFF_SIMD_NAMESPACE::broadcast_modulate(*a, backward);
}

}  // namespace

extern "C" int minidiff_fast_broadcast_modulate_forward(const minidiff_fast_broadcast_modulate* arguments) { return run(arguments, false); }

extern "C" int minidiff_fast_broadcast_modulate_backward(const minidiff_fast_broadcast_modulate* arguments) { return run(arguments, true); }
