// Small float32 matrix products on operands that lie in cache, C = A B, with B in panels of eight or sixteen columns.
//
// The caller packs: A either in panels of kTileRows rows, [panel][depth][kTileRows] (packed), or as rows of a matrix
// (strided). A tile of kTileRows x 16 of C lives in registers over the whole depth.
#ifndef MINIDIFF_FAST_CPU_GEMM_TILE_H
#define MINIDIFF_FAST_CPU_GEMM_TILE_H

#include "cpu/simd.h"

namespace MINIDIFF_SIMD_NAMESPACE {

constexpr int kTileRows = 6;
constexpr int kPanel = 16;  // columns of a panel of B

enum class Into {
  kStore,     // C = A B
  kAdd,       // C = C + A B
  kScaleAdd,  // C = C * factor + A B, a factor per column
};

enum class Layout { kPacked, kRows };

// One tile: M rows and 8 N columns of C. Products that fill few registers run several sums side by side.
template <int M, int N, Layout LAYOUT, Into INTO>
inline void gemm_tile(std::int64_t depth, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                      std::int64_t ldc, const V8* factor) {
  constexpr int kSums = M * N >= 6 ? 1 : M * N >= 3 ? 2 : 4;
  V8 sum[kSums][M][N] = {};
  std::int64_t k = 0;
  const auto step = [&](int s, std::int64_t at) __attribute__((always_inline)) {
    V8 column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(b + at * ldb + 8 * n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V8 x = broadcast(LAYOUT == Layout::kPacked ? a[at * kTileRows + m] : a[m * lda + at]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[s][m][n] = fma(x, column[n], sum[s][m][n]);
    }
  };
  for (; k + kSums <= depth; k += kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) step(s, k + s);
  }
  for (; k < depth; ++k) step(0, k);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      V8 total = sum[0][m][n];
      if constexpr (kSums == 2) total = total + sum[1][m][n];
      if constexpr (kSums == 4) total = (total + sum[1][m][n]) + (sum[2][m][n] + sum[3][m][n]);
      float* at = c + m * ldc + 8 * n;
      if constexpr (INTO == Into::kAdd) total = load(at) + total;
      if constexpr (INTO == Into::kScaleAdd) total = fma(load(at), factor[n], total);
      store(at, total);
    }
  }
}

// Sums of more terms than this are made in parts: float32's rounding grows with the length of a running sum.
constexpr std::int64_t kDepth = 64;

template <int M, int N, Layout LAYOUT, Into INTO>
inline void gemm_rows(std::int64_t depth, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                      std::int64_t ldc, const V8* factor) {
  gemm_tile<M, N, LAYOUT, INTO>(depth < kDepth ? depth : kDepth, a, lda, b, ldb, c, ldc, factor);
  for (std::int64_t k = kDepth; k < depth; k += kDepth) {
    const std::int64_t left = depth - k;
    gemm_tile<M, N, LAYOUT, Into::kAdd>(left < kDepth ? left : kDepth, a + k * (LAYOUT == Layout::kPacked ? kTileRows : 1),
                                        lda, b + k * ldb, ldb, c, ldc, nullptr);
  }
}

// rows x 8 N of C, N = 1 or 2; a panel of A follows the one before after `stride` floats (packed), a row of A the
// one before (rows).
template <int N, Layout LAYOUT, Into INTO>
inline void gemm(std::int64_t rows, std::int64_t depth, const float* a, std::int64_t stride, const float* b,
                 std::int64_t ldb, float* c, std::int64_t ldc, const V8* factor = nullptr) {
  const std::int64_t next = LAYOUT == Layout::kPacked ? stride : kTileRows * stride;
  for (; rows >= kTileRows; rows -= kTileRows, a += next, c += kTileRows * ldc) {
    gemm_rows<kTileRows, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
  }
  switch (rows) {
    case 5: return gemm_rows<5, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
    case 4: return gemm_rows<4, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
    case 3: return gemm_rows<3, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
    case 2: return gemm_rows<2, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
    case 1: return gemm_rows<1, N, LAYOUT, INTO>(depth, a, stride, b, ldb, c, ldc, factor);
    default: return;
  }
}

}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_GEMM_TILE_H
