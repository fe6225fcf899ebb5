// Broadcast attention, the memory side: rows and keys into the layouts that the products want, and what hides a key.
#ifndef MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_ROWS_H
#define MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_ROWS_H

#include <algorithm>

#include "cpu/gemm_tile.h"
#include "minidiff_fast.h"

namespace MINIDIFF_SIMD_NAMESPACE {

using Call = minidiff_fast_broadcast_attention;
using std::int64_t;

constexpr int kMaxRows = 64;    // rows of one block
constexpr int kMaxWidth = 256;  // head dimension
constexpr int kSlack = 16;      // floats behind every packed buffer: whole vectors are stored at its end

MINIDIFF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MINIDIFF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t group_size(const Call& c) { return c.heads / c.kv_heads; }
inline int64_t sample_rows(const Call& c) { return c.tokens * group_size(c); }

// ---------------------------------------------------------------------------------------------------------- rows

// Consecutive rows of one (condition, key/value head): row r = (k * T + t) * G + g.
struct RowBlock {
  int64_t first, count;
  int64_t sample[kMaxRows], token[kMaxRows], group[kMaxRows];
  int64_t index[kMaxRows];  // into a contiguous [B, K, T, H]

  void fill(const Call& c, int64_t b, int64_t h, int64_t first_row, int64_t rows) {
    const int64_t size = group_size(c);
    first = first_row, count = rows;
    int64_t g = first_row % size, t = first_row / size % c.tokens, k = first_row / size / c.tokens;
    for (int64_t i = 0; i < rows; ++i) {
      sample[i] = k, token[i] = t, group[i] = g;
      index[i] = ((b * c.samples + k) * c.tokens + t) * c.heads + h * size + g;
      if (++g < size) continue;
      g = 0;
      if (++t < c.tokens) continue;
      t = 0, ++k;
    }
  }
};

// Asks for the rows of a tensor that will be read or, with WRITE, written soon: rows of one head are far apart, and the
// processor does not foresee them.
template <bool WRITE, class T>
inline void prefetch_rows(const Call& c, const T* base, const int64_t* strides, int64_t b, int64_t h,
                          const RowBlock& rows, int64_t begin, int64_t end) {
  base += b * strides[0] + h * group_size(c) * strides[3];
  const int64_t bytes = c.width * static_cast<int64_t>(sizeof(T));
  for (int64_t r = begin; r < std::min(end, rows.count); ++r) {
    const char* row = reinterpret_cast<const char*>(base + rows.sample[r] * strides[1] + rows.token[r] * strides[2] +
                                                    rows.group[r] * strides[3]);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, WRITE ? 1 : 0, 2);
  }
}

// The same for rows of a contiguous [B, K, T, H, D].
template <bool WRITE, class T>
inline void prefetch_rows(const Call& c, const T* base, const RowBlock& rows, int64_t begin, int64_t end) {
  const int64_t bytes = c.width * static_cast<int64_t>(sizeof(T));
  for (int64_t r = begin; r < std::min(end, rows.count); ++r) {
    const char* row = reinterpret_cast<const char*>(base + rows.index[r] * c.width);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, WRITE ? 1 : 0, 2);
  }
}

// `width` elements that lie `stride` apart from `from` on: `from` itself, or the copy that they are gathered in.
template <class T>
inline const T* contiguous(const T* from, int64_t stride, int64_t width, T* copy) {
  if (stride == 1) return from;
  for (int64_t d = 0; d < width; ++d) copy[d] = from[d * stride];
  return copy;
}

// (The rows of `next` follow.) Rows of a [B, K, T, H, D] tensor times `factor`, zeros behind the last up to a multiple of eight:
// lanes [row / 16][d][row % 16], and, unless null, straight [d / 16][row of kMaxRows][d % 16].
template <class T>
inline void load_rows(const Call& c, const T* base, const int64_t* strides, int64_t b, int64_t h, const RowBlock& rows,
                      const RowBlock& next, float factor, float* lanes, float* straight) {
  static const T zeros[kMaxWidth] = {};
  T copies[8][kMaxWidth];
  const int64_t width = c.width;
  const T* const tensor = base;
  base += b * strides[0] + h * group_size(c) * strides[3];
  for (int64_t r0 = 0; r0 < rows.count; r0 += 8) {
    prefetch_rows<false>(c, tensor, strides, b, h, next, r0, r0 + 8);
    const T* from[8];
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t r = r0 + i;
      from[i] = zeros;
      if (r >= rows.count) continue;
      const T* row = base + rows.sample[r] * strides[1] + rows.token[r] * strides[2] + rows.group[r] * strides[3];
      from[i] = contiguous(row, strides[4], width, copies[i]);
    }
    float* to = lanes + r0 / kPanel * width * kPanel + r0 % kPanel;
    for (int64_t d = 0; d < width; d += 8) {
      const int64_t n = std::min<int64_t>(8, width - d);
      V8 x[8];
      for (int i = 0; i < 8; ++i) x[i] = (n == 8 ? load(from[i] + d) : load_partial(from[i] + d, n)) * factor;
      if (straight != nullptr) {
        float* at = straight + (d / kPanel * kMaxRows + r0) * kPanel + d % kPanel;
        for (int i = 0; i < 8; ++i) store(at + i * kPanel, x[i]);
      }
      transpose(x);
      for (int64_t i = 0; i < n; ++i) store(to + (d + i) * kPanel, x[i]);
    }
  }
}

// The inverse of load_rows from lanes, times a factor per row (one float a row, up to a multiple of eight).
template <class T>
inline void store_rows(const Call& c, const float* lanes, const float* factors, const RowBlock& rows, T* out) {
  const int64_t width = c.width;
  for (int64_t r0 = 0; r0 < rows.count; r0 += 8) {
    const float* from = lanes + r0 / kPanel * width * kPanel + r0 % kPanel;
    const int64_t present = std::min<int64_t>(8, rows.count - r0);
    const V8 factor = load(factors + r0);
    for (int64_t d = 0; d < width; d += 8) {
      const int64_t n = std::min<int64_t>(8, width - d);
      V8 x[8];
      for (int64_t i = 0; i < 8; ++i) x[i] = i < n ? load(from + (d + i) * kPanel) * factor : zero();
      transpose(x);
      for (int64_t i = 0; i < present; ++i) {
        T* to = out + rows.index[r0 + i] * width + d;
        n == 8 ? store(to, x[i]) : store_partial(to, x[i], n);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- keys

// Keys or values `list[j]` (j itself without a list) of one segment, for products where they are the left operand:
// by_key [j / 6][d][j % 6] (zeros behind the last key), by_channel [d / 6][j][d % 6]; a null one is left out.
template <class T>
inline void pack_keys(const T* base, int64_t stride, int64_t stride_d, const int64_t* list, int64_t count,
                      int64_t width, float* by_key, float* by_channel) {
  T copies[kTileRows][kMaxWidth];
  for (int64_t j0 = 0; j0 < count; j0 += kTileRows) {
    const int64_t present = std::min<int64_t>(kTileRows, count - j0);
    const T* from[kTileRows];
    for (int64_t i = 0; i < present; ++i) {
      const int64_t key = list == nullptr ? j0 + i : list[j0 + i];
      from[i] = contiguous(base + key * stride, stride_d, width, copies[i]);
    }
    if (by_key != nullptr) {
      for (int64_t d = 0; d < width; d += 8) {
        const int64_t n = std::min<int64_t>(8, width - d);
        V8 x[8] = {};
        for (int64_t i = 0; i < present; ++i) x[i] = n == 8 ? load(from[i] + d) : load_partial(from[i] + d, n);
        transpose(x);
        // Each store reaches two floats into the next one's place, which comes later.
        for (int64_t i = 0; i < n; ++i) store(by_key + (j0 * width + (d + i) * kTileRows), x[i]);
      }
    }
    if (by_channel == nullptr) continue;
    for (int64_t i = 0; i < present; ++i) {
      float* to = by_channel + (j0 + i) * kTileRows;
      for (int64_t d = 0; d < width; d += kTileRows, to += count * kTileRows) {
        const V8 x = width - d >= 8 ? load(from[i] + d) : load_partial(from[i] + d, width - d);
        j0 + i + 1 < count ? store(to, x) : store_partial(to, x, kTileRows);
      }
    }
  }
}

inline int64_t by_key_floats(int64_t count, int64_t width) { return round_up(count, kTileRows) * width + kSlack; }
inline int64_t by_channel_floats(int64_t count, int64_t width) { return round_up(width, kTileRows) * count + kSlack; }

// --------------------------------------------------------------------------------------------- shared keys and mask

// Where condition b's shared tokens begin, in tokens from the base of k and v, and how many there are.
struct Segment {
  int64_t start, count;
};

inline Segment segment_of(const Call& c, int64_t b) {
  if (c.cu_seqlens != nullptr) {
    const int64_t start = std::min(std::max<int64_t>(c.cu_seqlens[b], 0), c.shared);
    return {start, std::min(std::max<int64_t>(c.cu_seqlens[b + 1], start), c.shared) - start};
  }
  int64_t count = c.shared;
  if (c.lengths != nullptr) {
    const int64_t length = c.lengths_size == 4 ? static_cast<const std::int32_t*>(c.lengths)[b]
                                               : static_cast<const int64_t*>(c.lengths)[b];
    count = std::min(std::max<int64_t>(length, 0), count);
  }
  return {0, count};
}

// The shared keys that some query sees, and for each who sees it; the mask is periodic in rows, with period T * G.
struct SharedKeys {
  const int64_t* list;         // null: 0 .. count - 1
  int64_t count;
  const signed char* visible;  // null: everyone; else [count][period + kPanel], 0 or -1
  int64_t pitch;

  static int64_t visible_bytes(const Call& c, int64_t keys) {
    return c.mask != nullptr ? keys * (sample_rows(c) + kPanel) : 0;
  }
};

inline SharedKeys shared_keys(const Call& c, int64_t b, int64_t count, int64_t* list, signed char* visible) {
  SharedKeys keys{nullptr, count, nullptr, sample_rows(c) + kPanel};
  if (c.mask == nullptr) return keys;
  const unsigned char* base = c.mask + b * c.mask_strides[0];
  const int64_t tokens = c.mask_strides[1] == 0 ? 1 : c.tokens, size = group_size(c);
  bool partly = false;
  keys.list = list, keys.count = 0;
  for (int64_t s = 0; s < count; ++s) {
    int64_t seen = 0;
    for (int64_t t = 0; t < tokens; ++t) seen += base[t * c.mask_strides[1] + s * c.mask_strides[2]] != 0;
    if (seen == 0) continue;
    signed char* row = visible + keys.count * keys.pitch;
    list[keys.count++] = s;
    partly = partly || seen < tokens;
    for (int64_t i = 0, t = 0, g = 0; i < keys.pitch; ++i) {
      row[i] = base[t * c.mask_strides[1] + s * c.mask_strides[2]] != 0 ? -1 : 0;
      if (++g < size) continue;
      g = 0;
      if (++t == c.tokens) t = 0;
    }
  }
  if (partly) keys.visible = visible;
  return keys;
}

// What the softmax does to a logit of key `j` of the block and eight rows: nothing, or -inf where it must not see.
struct Everyone {
  static constexpr bool kHides = false;
  MINIDIFF_INLINE V8 operator()(int64_t, int, V8 logit) const { return logit; }
};

struct MaskedShared {
  static constexpr bool kHides = true;
  const signed char* visible;  // of the block's first key and the panel's first row
  int64_t pitch;

  MINIDIFF_INLINE V8 operator()(int64_t j, int n, V8 logit) const {
    typedef signed char C8 __attribute__((vector_size(8)));
    C8 bytes;
    std::memcpy(&bytes, visible + j * pitch + 8 * n, sizeof bytes);
    return select(__builtin_convertvector(bytes, I8), logit, broadcast(-kInfinity));
  }
};

struct OwnOnly {
  static constexpr bool kHides = true;
  const I8* mine;        // per eight rows: are they of this sample
  const I8* last_key;    // per eight rows: the last own key that they see
  std::int32_t first_key;

  MINIDIFF_INLINE V8 operator()(int64_t j, int n, V8 logit) const {
    const I8 seen = mine[n] & (last_key[n] >= (I8{} + (first_key + static_cast<std::int32_t>(j))));
    return select(seen, logit, broadcast(-kInfinity));
  }
};

// ------------------------------------------------------------------------------------------------------- dropout

MINIDIFF_INLINE void multiply_wide(U8 x, std::uint32_t by, U8* high, U8* low) {
#if defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(by));
  const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
  *high = (U8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (U8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < 8; ++i) {
    const std::uint64_t product = static_cast<std::uint64_t>(x[i]) * by;
    (*high)[i] = static_cast<std::uint32_t>(product >> 32);
    (*low)[i] = static_cast<std::uint32_t>(product);
  }
#endif
}

// First word of Philox-4x32-10 under the counter (c0, c1, c2, 0).
MINIDIFF_INLINE U8 philox_word(std::uint64_t seed, U8 c0, U8 c1, U8 c2) {
  U8 c3 = {};
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U8 high0, low0, high1, low1;
    multiply_wide(c0, 0xd2511f53u, &high0, &low0);
    multiply_wide(c2, 0xcd9e8d57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return c0;
}

// Which weights of one segment's keys survive, for the rows of a block.
struct Dropout {
  bool used;
  std::uint64_t seed, threshold;
  U8 low[kMaxRows / 8], high[kMaxRows / 8];  // of the rows' linear index

  explicit Dropout(const Call& c)
      : used(c.seed != nullptr),
        seed(used ? static_cast<std::uint64_t>(*c.seed) : 0),
        threshold(static_cast<std::uint64_t>(c.dropout_threshold)) {}

  void rows(const RowBlock& block) {
    if (!used) return;
    for (int64_t i = 0; i < round_up(block.count, 8); ++i) {
      const std::uint64_t index = i < block.count ? static_cast<std::uint64_t>(block.index[i]) : 0;
      low[i / 8][i % 8] = static_cast<std::uint32_t>(index);
      high[i / 8][i % 8] = static_cast<std::uint32_t>(index >> 32);
    }
  }

  // -1 where the weight of key column `column` in row 8 * n + lane stays.
  MINIDIFF_INLINE I8 kept(int64_t n, int64_t column) const {
    const U8 word = philox_word(seed, low[n], U8{} + static_cast<std::uint32_t>(column), high[n]);
    if (threshold > 0xffffffffu) return I8{};
    return (I8)(word >= (U8{} + static_cast<std::uint32_t>(threshold)));
  }
};

}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_ROWS_H
