// Broadcast attention on any processor, and the C interface; see broadcast_attention_kernel.h.
#define MINIDIFF_SIMD_NAMESPACE minidiff_portable
#include "cpu/broadcast_attention_kernel.h"
#include "cpu/dispatch.h"

#if MINIDIFF_FAST_WITH_AVX2
int minidiff_fast_broadcast_attention_forward_avx2(const minidiff_fast_broadcast_attention& call);
int minidiff_fast_broadcast_attention_backward_avx2(const minidiff_fast_broadcast_attention& call);
#endif

namespace {

using Call = minidiff_fast_broadcast_attention;

bool valid(const Call* call) {
  using MINIDIFF_SIMD_NAMESPACE::kMaxWidth;
  return call != nullptr && call->size == sizeof(Call) && (call->dtype == 0 || call->dtype == 1) &&
         call->width >= 1 && call->width <= kMaxWidth && call->kv_heads >= 1 && call->heads % call->kv_heads == 0;
}

bool empty(const Call& call) { return call.batch * call.samples * call.tokens * call.heads == 0; }

}  // namespace

extern "C" int minidiff_fast_broadcast_attention_forward(const minidiff_fast_broadcast_attention* call) {
  if (!valid(call)) return MINIDIFF_FAST_EINVALID;
  if (empty(*call)) return MINIDIFF_FAST_OK;
#if MINIDIFF_FAST_WITH_AVX2
  if (!call->portable && minidiff_fast_runs_avx2()) return minidiff_fast_broadcast_attention_forward_avx2(*call);
#endif
  using namespace MINIDIFF_SIMD_NAMESPACE;
  return call->dtype == 0 ? forward<float>(*call) : forward<bfloat16>(*call);
}

extern "C" int minidiff_fast_broadcast_attention_backward(const minidiff_fast_broadcast_attention* call) {
  if (!valid(call)) return MINIDIFF_FAST_EINVALID;
  if (empty(*call)) return MINIDIFF_FAST_OK;
#if MINIDIFF_FAST_WITH_AVX2
  if (!call->portable && minidiff_fast_runs_avx2()) return minidiff_fast_broadcast_attention_backward_avx2(*call);
#endif
  using namespace MINIDIFF_SIMD_NAMESPACE;
  return call->dtype == 0 ? backward<float>(*call) : backward<bfloat16>(*call);
}
