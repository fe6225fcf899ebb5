// Broadcast attention on the CPU, the backward pass; included by broadcast_attention_kernel.h.
//
// With delta = rowsum(dout * out) - dlse and p = exp(logits - lse): dv = p^T dout, ds = p (dout v^T - delta),
// dq = scale ds k, dk = ds^T (scale q).
#ifndef MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_BACKWARD_H
#define MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_BACKWARD_H

namespace MINIDIFF_SIMD_NAMESPACE {

// Keys of one segment as the three products want them, and the sums of their gradients, [key][width up to eights].
struct PackedKeys {
  float *keys, *values, *keys_by_channel, *dk, *dv;

  PackedKeys(const Call& c, int64_t count, bool sums, Arena& arena) {
    keys = arena.take<float>(by_key_floats(count, c.width));
    values = arena.take<float>(by_key_floats(count, c.width));
    keys_by_channel = arena.take<float>(by_channel_floats(count, c.width));
    dk = arena.take<float>(sums ? count * round_up(c.width, 8) : 0);
    dv = arena.take<float>(sums ? count * round_up(c.width, 8) : 0);
  }
};

struct BackwardScratch {
  PackedKeys shared, own;
  float *q, *q_straight, *dout, *dout_straight, *dq;
  float *weights, *dlogits;  // [kBackwardKeys][kMaxRows]
  float *lse, *lacking, *delta, *factors;
  int64_t* list;
  signed char* visible;

  BackwardScratch(const Call& c, int64_t most, bool sums, Arena& arena)
      : shared(c, most, sums, arena), own(c, c.own, true, arena) {
    const int64_t lanes = kMaxRows * c.width, straight = kMaxRows * round_up(c.width, kPanel);
    q = arena.take<float>(lanes), q_straight = arena.take<float>(straight);
    dout = arena.take<float>(lanes), dout_straight = arena.take<float>(straight);
    dq = arena.take<float>(lanes);
    weights = arena.take<float>(kBackwardKeys * kMaxRows);
    dlogits = arena.take<float>(kBackwardKeys * kMaxRows);
    lse = arena.take<float>(kMaxRows), lacking = arena.take<float>(kMaxRows);
    delta = arena.take<float>(kMaxRows), factors = arena.take<float>(kMaxRows);
    list = arena.take<int64_t>(c.mask != nullptr ? most : 0);
    visible = arena.take<signed char>(SharedKeys::visible_bytes(c, most));
  }
};

// lse, what it lacks, and delta per row; 0 behind the last row and where a row saw nothing (its weights are 0, and a
// NaN in the gradient of its lse must not reach the keys).
template <class T>
void row_statistics(const Call& c, const RowBlock& rows, const RowBlock& next, const BackwardScratch& s) {
  for (int64_t r = 0; r < round_up(rows.count, 8); ++r) {
    prefetch_rows<false>(c, static_cast<const T*>(c.out), next, r, r + 1);
    const int64_t index = r < rows.count ? rows.index[r] : 0;
    const bool seen = r < rows.count && c.lse[index] != -kInfinity;
    s.lse[r] = seen ? c.lse[index] : 0.0f;
    s.lacking[r] = seen && c.lse_correction != nullptr ? c.lse_correction[index] : 0.0f;
    s.delta[r] = 0.0f;
    if (!seen) continue;
    const T* out = static_cast<const T*>(c.out) + index * c.width;
    V8 sum = zero();
    for (int64_t d = 0; d < c.width; d += 8) {
      const int64_t n = c.width - d;
      const V8 x = n >= 8 ? load(out + d) : load_partial(out + d, n);
      sum = fma(x, load(s.dout_straight + (d / kPanel * kMaxRows + r) * kPanel + d % kPanel), sum);
    }
    s.delta[r] = horizontal_sum(sum) - c.dlse[index];
  }
}

// weights (kept ones, scaled) and dlogits of a block of keys for 8 N rows, from group `group` of the block of rows on.
template <int N, class Sees>
void differentiate(const Call& c, const BackwardScratch& s, int64_t group, const float* keys, const float* values,
                   int64_t count, const Sees& sees, const Dropout& dropout, const int64_t* columns,
                   int64_t first_column) {
  const int64_t width = c.width, lane = 8 * group;
  const int64_t panel = lane / kPanel * width * kPanel + lane % kPanel;
  float *weights = s.weights + lane, *dlogits = s.dlogits + lane;
  gemm<N, Layout::kPacked, Into::kStore>(count, width, keys, width * kTileRows, s.q + panel, kPanel, weights,
                                         kMaxRows);
  gemm<N, Layout::kPacked, Into::kStore>(count, width, values, width * kTileRows, s.dout + panel, kPanel, dlogits,
                                         kMaxRows);
  V8 lse[N], lacking[N], delta[N];
  for (int n = 0; n < N; ++n) {
    lse[n] = load(s.lse + lane + 8 * n);
    lacking[n] = load(s.lacking + lane + 8 * n);
    delta[n] = load(s.delta + lane + 8 * n);
  }
  const float keep_scale = static_cast<float>(c.keep_scale);
  for (int64_t j = 0; j < count; ++j) {
    for (int n = 0; n < N; ++n) {
      float *weight = weights + j * kMaxRows + 8 * n, *dlogit = dlogits + j * kMaxRows + 8 * n;
      const V8 p = exp_weight(sees(j, n, load(weight)) - lse[n] - lacking[n]);
      V8 kept = p, dp = load(dlogit);
      if (dropout.used) {
        const int64_t column = columns == nullptr ? first_column + j : columns[j];
        const V8 factor = select(dropout.kept(group + n, column), broadcast(keep_scale), zero());
        kept = p * factor, dp = dp * factor;
      }
      store(weight, kept);
      store(dlogit, p * (dp - delta[n]));
    }
  }
}

template <class... Arguments>
void differentiate(int64_t groups, const Call& c, Arguments&&... arguments) {
  groups == 2 ? differentiate<2>(c, arguments...) : differentiate<1>(c, arguments...);
}

// dq of the rows of 8 `groups` lanes, from group `group` on, over a block of keys.
template <Into INTO>
void add_dq(const Call& c, const BackwardScratch& s, int64_t group, int64_t groups, const float* by_channel,
                   int64_t stride, int64_t count) {
  const int64_t lane = 8 * group, panel = lane / kPanel * c.width * kPanel + lane % kPanel;
  const auto product = groups == 2 ? gemm<2, Layout::kPacked, INTO> : gemm<1, Layout::kPacked, INTO>;
  product(c.width, count, by_channel, stride, s.dlogits + lane, kMaxRows, s.dq + panel, kPanel, nullptr);
}

// sums [key][width] += left [key][rows begin .. end] straight [rows][width]
inline void add_to_keys(const Call& c, const float* left, const float* straight, int64_t begin, int64_t end,
                        int64_t count, float* sums) {
  const int64_t width = round_up(c.width, 8);
  for (int64_t d = 0; d < width; d += kPanel) {
    const auto product = width - d >= kPanel ? gemm<2, Layout::kRows, Into::kAdd> : gemm<1, Layout::kRows, Into::kAdd>;
    product(count, end - begin, left + begin, kMaxRows, straight + (d * kMaxRows + begin * kPanel), kPanel, sums + d,
            width, nullptr);
  }
}

inline void add_to_keys(const Call& c, const BackwardScratch& s, int64_t begin, int64_t end, int64_t count, float* dk,
                        float* dv) {
  add_to_keys(c, s.weights, s.dout_straight, begin, end, count, dv);
  add_to_keys(c, s.dlogits, s.q_straight, begin, end, count, dk);
}

template <class Sees>
void backward_shared(const Call& c, const RowBlock& rows, const BackwardScratch& s, const SharedKeys& shared,
                     int64_t start, const PackedKeys& sums, const Dropout& dropout) {
  const int64_t phase = rows.first % sample_rows(c), period = sample_rows(c);
  for (int64_t j = 0; j < shared.count; j += kBackwardKeys) {
    const int64_t count = std::min(kBackwardKeys, shared.count - j);
    const int64_t* columns = shared.list == nullptr ? nullptr : shared.list + j;
    for (int64_t group = 0; 8 * group < rows.count; group += 2) {
      const int64_t groups = std::min<int64_t>(2, ceil_div(rows.count, 8) - group);
      Sees sees{};
      if constexpr (Sees::kHides) {
        sees = {shared.visible + j * shared.pitch + (phase + 8 * group) % period, shared.pitch};
      }
      differentiate(groups, c, s, group, s.shared.keys + j * c.width, s.shared.values + j * c.width, count, sees,
                    dropout, columns, start + j);
      if (c.dq != nullptr) {
        const auto add = j == 0 ? add_dq<Into::kStore> : add_dq<Into::kAdd>;
        add(c, s, group, groups, s.shared.keys_by_channel + j * kTileRows, shared.count * kTileRows, count);
      }
    }
    if (c.dk != nullptr) {
      const int64_t at = j * round_up(c.width, 8);
      add_to_keys(c, s, 0, rows.count, count, sums.dk + at, sums.dv + at);
    }
  }
}

template <class T>
void store_keys(const float* sums, int64_t count, const int64_t* list, int64_t width, int64_t stride, T* out) {
  for (int64_t j = 0; j < count; ++j) {
    const float* from = sums + j * round_up(width, 8);
    T* to = out + (list == nullptr ? j : list[j]) * stride;
    for (int64_t d = 0; d < width; d += 8) store_partial(to + d, load(from + d), std::min<int64_t>(8, width - d));
  }
}

template <class T>
void pack_segment(const T* k, int64_t k_stride, int64_t k_stride_d, const T* v, int64_t v_stride, int64_t v_stride_d,
                  const int64_t* list, int64_t count, int64_t width, const PackedKeys& to) {
  pack_keys(k, k_stride, k_stride_d, list, count, width, to.keys, to.keys_by_channel);
  pack_keys(v, v_stride, v_stride_d, list, count, width, to.values, nullptr);
}

template <class T>
void backward_own(const Call& c, const Task& task, const RowBlock& rows, OwnLanes& lanes, const BackwardScratch& s,
                  const Dropout& dropout, int64_t& packed) {
  const int64_t width = round_up(c.width, 8);
  lanes.fill(c, rows);
  for (int64_t k = rows.sample[0]; k <= rows.sample[rows.count - 1]; ++k) {
    if (k != packed) {
      packed = k;
      pack_segment(own_base<T>(c.own_k, c.own_k_strides, task.b, k, task.h), c.own_k_strides[2], c.own_k_strides[4],
                   own_base<T>(c.own_v, c.own_v_strides, task.b, k, task.h), c.own_v_strides[2], c.own_v_strides[4],
                   nullptr, c.own, c.width, s.own);
      std::fill_n(s.own.dk, c.own * width, 0.0f);
      std::fill_n(s.own.dv, c.own * width, 0.0f);
    }
    const OwnRows own(c, rows, k);
    for (int64_t p = 0; p < own.keys; p += kBackwardKeys) {
      const int64_t block = std::min(kBackwardKeys, own.keys - p);
      for (int64_t group = own.first_group(), groups; group < own.last_group(); group += groups) {
        // Pairs stay within a panel of sixteen.
        groups = group % 2 == 0 && group + 2 <= own.last_group() ? 2 : 1;
        const int64_t last = std::min(8 * (group + groups), own.end) - 1;
        const int64_t count = c.own_causal ? std::min(block, rows.token[last] + 1 - p) : block;
        for (int64_t g = group; g < group + groups; ++g) {
          lanes.mine[g] = lanes.sample[g] == (I8{} + static_cast<std::int32_t>(k - rows.sample[0]));
        }
        for (int64_t j = std::max<int64_t>(count, 0); j < block; ++j) {  // keys that none of these rows sees
          std::fill_n(s.weights + j * kMaxRows + 8 * group, 8 * groups, 0.0f);
          std::fill_n(s.dlogits + j * kMaxRows + 8 * group, 8 * groups, 0.0f);
        }
        if (count <= 0) continue;
        const OwnOnly sees{lanes.mine + group, lanes.last_key + group, static_cast<std::int32_t>(p)};
        differentiate(groups, c, s, group, s.own.keys + p * c.width, s.own.values + p * c.width, count, sees, dropout,
                      nullptr, c.own_column + p);
        if (c.dq != nullptr) {
          add_dq<Into::kAdd>(c, s, group, groups, s.own.keys_by_channel + p * kTileRows, c.own * kTileRows, count);
        }
      }
      if (c.down_k != nullptr) {
        add_to_keys(c, s, own.begin, own.end, block, s.own.dk + p * width, s.own.dv + p * width);
      }
    }
    const bool ends = (k + 1) * sample_rows(c) <= rows.first + rows.count;
    if (ends && c.down_k != nullptr) {
      const int64_t stride = c.kv_heads * c.width;
      const int64_t at = ((task.b * c.samples + k) * c.own * c.kv_heads + task.h) * c.width;
      store_keys(s.own.dk, c.own, nullptr, c.width, stride, static_cast<T*>(c.down_k) + at);
      store_keys(s.own.dv, c.own, nullptr, c.width, stride, static_cast<T*>(c.down_v) + at);
    }
  }
}

// The sums of dk and dv of a (b, h) into the gradients; tokens that nobody sees get 0.
template <class T>
void store_shared(const Call& c, const Task& task, const Segment& segment, const SharedKeys& shared, const float* dk,
                  const float* dv) {
  const int64_t stride = c.kv_heads * c.width;
  const bool is_packed = c.cu_seqlens != nullptr;
  const int64_t begin = is_packed ? segment.start : task.b * c.shared;
  const int64_t at = begin * stride + task.h * c.width;
  T *to_k = static_cast<T*>(c.dk) + at, *to_v = static_cast<T*>(c.dv) + at;
  for (int64_t s = shared.list != nullptr ? 0 : segment.count; s < (is_packed ? segment.count : c.shared); ++s) {
    std::fill_n(to_k + s * stride, c.width, T{});
    std::fill_n(to_v + s * stride, c.width, T{});
  }
  store_keys(dk, shared.count, shared.list, c.width, stride, to_k);
  store_keys(dv, shared.count, shared.list, c.width, stride, to_v);
}

// Sums of dk and dv go to `sums`; they are stored here where a (b, h) is one task.
template <class T>
void backward_task(const Call& c, const Task& task, const BackwardScratch& s, const PackedKeys& sums, bool whole) {
  const Segment segment = segment_of(c, task.b);
  const SharedKeys shared = shared_keys(c, task.b, segment.count, s.list, s.visible);
  pack_segment(shared_base<T>(c.k, c.k_strides, task.b, segment.start, task.h), c.k_strides[1], c.k_strides[3],
               shared_base<T>(c.v, c.v_strides, task.b, segment.start, task.h), c.v_strides[1], c.v_strides[3],
               shared.list, shared.count, c.width, s.shared);
  if (c.dk != nullptr) {
    std::fill_n(sums.dk, shared.count * round_up(c.width, 8), 0.0f);
    std::fill_n(sums.dv, shared.count * round_up(c.width, 8), 0.0f);
  }
  const int64_t block = c.width > 128 ? 32 : kMaxRows;
  RowBlocks blocks(c, task, block);
  OwnLanes lanes;
  Dropout dropout(c);
  int64_t packed = -1;
  std::fill_n(s.factors, kMaxRows, static_cast<float>(c.scale));
  for (int64_t first = task.first; first < task.last; first += block) {
    blocks.advance();
    const RowBlock &rows = blocks.now(), &next = blocks.next();
    dropout.rows(rows);
    load_rows(c, static_cast<const T*>(c.q), c.q_strides, task.b, task.h, rows, next, static_cast<float>(c.scale),
              s.q, s.q_straight);
    load_rows(c, static_cast<const T*>(c.dout), c.dout_strides, task.b, task.h, rows, next, 1.0f, s.dout,
              s.dout_straight);
    row_statistics<T>(c, rows, next, s);
    if (c.dq != nullptr) prefetch_rows<true>(c, static_cast<const T*>(c.dq), rows, 0, rows.count);
    if (shared.count == 0) std::fill_n(s.dq, round_up(rows.count, kPanel) * c.width, 0.0f);
    if (shared.visible == nullptr) {
      backward_shared<Everyone>(c, rows, s, shared, segment.start, sums, dropout);
    } else {
      backward_shared<MaskedShared>(c, rows, s, shared, segment.start, sums, dropout);
    }
    if (c.own > 0) backward_own<T>(c, task, rows, lanes, s, dropout, packed);
    if (c.dq != nullptr) store_rows(c, s.dq, s.factors, rows, static_cast<T*>(c.dq));
  }
  if (whole && c.dk != nullptr) store_shared<T>(c, task, segment, shared, sums.dk, sums.dv);
}

// Adds the parts' sums of every (b, h), in the order of the rows, and stores them.
template <class T>
int join_parts(const Call& c, const Division& division, int64_t most, float* parts) {
  const int64_t size = most * round_up(c.width, 8);
  Arena measure(nullptr);
  measure.take<int64_t>(most), measure.take<signed char>(SharedKeys::visible_bytes(c, most));
  return for_each_task(c, c.batch * c.kv_heads, measure.used(), [&](int64_t i, char* memory) {
    const Task task = division.task(c, i * division.parts);
    const Segment segment = segment_of(c, task.b);
    Arena arena(memory);
    int64_t* list = arena.take<int64_t>(most);
    signed char* visible = arena.take<signed char>(SharedKeys::visible_bytes(c, most));
    const SharedKeys shared = shared_keys(c, task.b, segment.count, list, visible);
    float* total = parts + i * division.parts * 2 * size;
    for (int64_t which = 0; which < 2; ++which) {
      for (int64_t part = 1; part < division.parts; ++part) {
        float *to = total + which * size, *from = to + part * 2 * size;
        for (int64_t x = 0; x < shared.count * round_up(c.width, 8); x += 8) store(to + x, load(to + x) + load(from + x));
      }
    }
    store_shared<T>(c, task, segment, shared, total, total + size);
  });
}

template <class T>
int backward(const Call& c) {
  const int64_t most = most_keys(c), size = most * round_up(c.width, 8);
  // Own keys' gradients are summed where their sample's rows are: a task has whole samples then.
  const Division division(c, c.own > 0 ? sample_rows(c) : kMaxRows);
  const int64_t tasks = c.batch * c.kv_heads * division.parts;
  const bool whole = division.parts == 1;
  float* parts = nullptr;
  if (!whole && c.dk != nullptr) {
    parts = static_cast<float*>(std::malloc(static_cast<std::size_t>(std::max<int64_t>(tasks * 2 * size, 1)) * sizeof(float)));
    if (parts == nullptr) return MINIDIFF_FAST_ENOMEM;
  }
  Arena measure(nullptr);
  BackwardScratch{c, most, whole, measure};
  int status = for_each_task(c, tasks, measure.used(), [&](int64_t i, char* memory) {
    Arena arena(memory);
    const BackwardScratch scratch(c, most, whole, arena);
    PackedKeys sums = scratch.shared;
    if (parts != nullptr) sums.dk = parts + i * 2 * size, sums.dv = sums.dk + size;
    backward_task<T>(c, division.task(c, i), scratch, sums, whole);
  });
  if (status == MINIDIFF_FAST_OK && parts != nullptr) status = join_parts<T>(c, division, most, parts);
  std::free(parts);
  return status;
}

}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_BACKWARD_H
