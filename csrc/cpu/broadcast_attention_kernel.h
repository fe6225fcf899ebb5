// Broadcast attention on the CPU, forward and backward, for one instruction set.
//
// Everything that shares a condition b and a key/value head h is folded into rows, r = (k * T + t) * G + g, and rows
// lie in the lanes of a vector: logits are [key][row], so that the softmax of a row needs nothing from another lane,
// and no head dimension is padded. Sixteen rows at a time run through an online softmax over blocks of keys, those of
// the condition (packed once per task) and those of the rows' own samples. The backward takes blocks of rows through
// blocks of keys, recomputes the weights from the log-sum-exp and adds to dk and dv in float32.
//
// A task is one (b, h), or some of its rows where there are few of those; dk and dv of such parts are added in the
// order of the rows. So every result is a function of the inputs and the number of threads.
#ifndef MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_KERNEL_H
#define MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_KERNEL_H

#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/broadcast_attention_rows.h"

namespace MINIDIFF_SIMD_NAMESPACE {

constexpr int64_t kForwardKeys = 96;   // keys of one block: multiples of kTileRows
constexpr int64_t kBackwardKeys = 48;

// Hands out pieces of one allocation; from null it measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(std::max<int64_t>(count, 0) * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Per eight rows of a block, what decides which own keys they see.
struct OwnLanes {
  I8 sample[kMaxRows / 8], last_key[kMaxRows / 8], mine[kMaxRows / 8];

  void fill(const Call& c, const RowBlock& rows) {
    for (int64_t i = 0; i < round_up(rows.count, 8); ++i) {
      const bool present = i < rows.count;
      sample[i / 8][i % 8] = present ? static_cast<std::int32_t>(rows.sample[i] - rows.sample[0]) : -1;
      last_key[i / 8][i % 8] =
          present && c.own_causal ? static_cast<std::int32_t>(rows.token[i]) : std::numeric_limits<std::int32_t>::max();
    }
  }
};

// The rows of one sample in a block, and how many own keys the last of them sees.
struct OwnRows {
  int64_t begin, end, keys;

  OwnRows(const Call& c, const RowBlock& rows, int64_t sample) {
    begin = std::max<int64_t>(sample * sample_rows(c) - rows.first, 0);
    end = std::min((sample + 1) * sample_rows(c) - rows.first, rows.count);
    keys = c.own_causal ? rows.token[end - 1] + 1 : c.own;
  }
  int64_t first_group() const { return begin / 8; }
  int64_t last_group() const { return ceil_div(end, 8); }
};

template <class T>
const T* own_base(const void* tensor, const int64_t* strides, int64_t b, int64_t k, int64_t h) {
  return static_cast<const T*>(tensor) + b * strides[0] + k * strides[1] + h * strides[3];
}

template <class T>
const T* shared_base(const void* tensor, const int64_t* strides, int64_t b, int64_t start, int64_t h) {
  return static_cast<const T*>(tensor) + b * strides[0] + start * strides[1] + h * strides[2];
}

// A range of rows of one (b, h).
struct Task {
  int64_t b, h, part, first, last;
};

// The blocks of rows of a task, one after the other, and always the one behind.
class RowBlocks {
 public:
  RowBlocks(const Call& c, const Task& task, int64_t size) : c_(c), task_(task), size_(size), at_(task.first) { fill(); }
  void advance() {
    which_ ^= 1;
    at_ += size_;
    fill();
  }
  const RowBlock& now() const { return blocks_[which_]; }
  const RowBlock& next() const { return blocks_[which_ ^ 1]; }

 private:
  void fill() {
    blocks_[which_ ^ 1].fill(c_, task_.b, task_.h, at_, std::max<int64_t>(std::min(size_, task_.last - at_), 0));
  }
  const Call& c_;
  const Task& task_;
  const int64_t size_;
  int64_t at_;
  int which_ = 0;
  RowBlock blocks_[2];
};

// How rows are divided: parts of `rows` rows for each of the B * Hkv pairs.
struct Division {
  int64_t parts, rows, total;

  Division(const Call& c, int64_t unit) {
    total = c.samples * sample_rows(c);
    const int64_t pairs = c.batch * c.kv_heads, units = ceil_div(total, unit);
    // Enough tasks that threads end at about the same time.
    const bool enough = c.threads <= 1 || pairs >= 4 * c.threads;
    const int64_t wanted = enough ? 1 : std::min(units, ceil_div(4 * c.threads, pairs));
    rows = ceil_div(units, wanted) * unit;
    parts = ceil_div(total, rows);
  }
  Task task(const Call& c, int64_t i) const {
    const int64_t part = i % parts, pair = i / parts;
    return {pair / c.kv_heads, pair % c.kv_heads, part, part * rows, std::min(total, (part + 1) * rows)};
  }
};

inline int64_t most_keys(const Call& c) {
  int64_t most = 0;
  for (int64_t b = 0; b < c.batch; ++b) most = std::max(most, segment_of(c, b).count);
  return most;
}

// Runs body(task index, scratch of this thread) for every task. The order of tasks decides nothing.
template <class Body>
int for_each_task(const Call& c, int64_t tasks, int64_t scratch_bytes, const Body& body) {
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(c.threads, tasks)));
  char* memory = static_cast<char*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(scratch_bytes, 64) * threads)));
  if (memory == nullptr) return MINIDIFF_FAST_ENOMEM;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* mine = memory + omp_get_thread_num() * round_up(scratch_bytes, 64);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) body(i, mine);
  }
#else
  for (int64_t i = 0; i < tasks; ++i) body(i, memory);
#endif
  std::free(memory);
  return MINIDIFF_FAST_OK;
}

// ------------------------------------------------------------------------------------------------------- forward

struct ForwardScratch {
  float *keys, *values, *own_keys, *own_values, *q, *out, *logits;
  int64_t* list;
  signed char* visible;

  ForwardScratch(const Call& c, int64_t most, Arena& arena) {
    keys = arena.take<float>(by_key_floats(most, c.width));
    values = arena.take<float>(by_channel_floats(most, c.width));
    own_keys = arena.take<float>(by_key_floats(c.own, c.width));
    own_values = arena.take<float>(by_channel_floats(c.own, c.width));
    q = arena.take<float>(c.width * kPanel);
    out = arena.take<float>(c.width * kPanel);
    logits = arena.take<float>(kForwardKeys * kPanel);
    list = arena.take<int64_t>(c.mask != nullptr ? most : 0);
    visible = arena.take<signed char>(SharedKeys::visible_bytes(c, most));
  }
};

// Sixteen rows under way: out is [D][kPanel], not yet divided by sum.
struct RowPanel {
  const float* q;
  float *out, *logits;
  bool fresh;  // out holds nothing yet
  V8 top[2], sum[2];
};

// A block of keys through the online softmax of 8 N rows, from lane 8 * group on.
template <int N, class Sees>
void attend(RowPanel& panel, int group, const float* keys, const float* values, int64_t value_stride, int64_t count,
            int64_t width, const Sees& sees, const Dropout& dropout, const int64_t* columns, int64_t first_column) {
  float* logits = panel.logits;
  gemm<N, Layout::kPacked, Into::kStore>(count, width, keys, width * kTileRows, panel.q + 8 * group, kPanel, logits,
                                         kPanel);
  V8 top[N], shift[N], decay[N], sum[N];
  for (int n = 0; n < N; ++n) top[n] = panel.top[group + n];
  for (int64_t j = 0; j < count; ++j) {
    for (int n = 0; n < N; ++n) {
      float* at = logits + j * kPanel + 8 * n;
      const V8 logit = sees(j, n, load(at));
      if (Sees::kHides) store(at, logit);
      top[n] = max(top[n], logit);
    }
  }
  for (int n = 0; n < N; ++n) {
    // A row that has seen no key keeps -inf; subtracting 0 instead keeps e^-inf = 0 free of NaN.
    shift[n] = select(top[n] == -kInfinity, zero(), top[n]);
    decay[n] = exp_weight(panel.top[group + n] - shift[n]);
    sum[n] = zero();
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int n = 0; n < N; ++n) {
      float* at = logits + j * kPanel + 8 * n;
      const V8 weight = exp_weight(load(at) - shift[n]);
      sum[n] = sum[n] + weight;
      store(at, weight);
    }
  }
  for (int n = 0; n < N; ++n) {
    panel.top[group + n] = top[n];
    panel.sum[group + n] = fma(panel.sum[group + n], decay[n], sum[n]);
  }
  for (int64_t j = 0; dropout.used && j < count; ++j) {
    const int64_t column = columns == nullptr ? first_column + j : columns[j];
    for (int n = 0; n < N; ++n) {
      float* at = logits + j * kPanel + 8 * n;
      store(at, as_float(as_int(load(at)) & dropout.kept(group + n, column)));
    }
  }
  const auto product =
      panel.fresh ? gemm<N, Layout::kPacked, Into::kStore> : gemm<N, Layout::kPacked, Into::kScaleAdd>;
  product(width, count, values, value_stride, logits, kPanel, panel.out + 8 * group, kPanel, decay);
}

template <class... Arguments>
void attend(int groups, RowPanel& panel, Arguments&&... arguments) {
  groups == 2 ? attend<2>(panel, arguments...) : attend<1>(panel, arguments...);
}

template <class T>
void attend_own(const Call& c, const Task& task, const RowBlock& rows, RowPanel& panel, OwnLanes& lanes,
                const Dropout& dropout, const ForwardScratch& scratch, int64_t& packed) {
  lanes.fill(c, rows);
  for (int64_t k = rows.sample[0]; k <= rows.sample[rows.count - 1]; ++k) {
    if (k != packed) {
      packed = k;
      pack_keys(own_base<T>(c.own_k, c.own_k_strides, task.b, k, task.h), c.own_k_strides[2], c.own_k_strides[4],
                nullptr, c.own, c.width, scratch.own_keys, nullptr);
      pack_keys(own_base<T>(c.own_v, c.own_v_strides, task.b, k, task.h), c.own_v_strides[2], c.own_v_strides[4],
                nullptr, c.own, c.width, nullptr, scratch.own_values);
    }
    const OwnRows own(c, rows, k);
    const int first = static_cast<int>(own.first_group()), groups = static_cast<int>(own.last_group()) - first;
    const bool everyone = !c.own_causal && own.end - own.begin == 8 * groups;
    for (int g = first; g < first + groups; ++g) {
      lanes.mine[g] = lanes.sample[g] == (I8{} + static_cast<std::int32_t>(k - rows.sample[0]));
    }
    for (int64_t p = 0; p < own.keys; p += kForwardKeys) {
      const float* keys = scratch.own_keys + p * c.width;
      const float* values = scratch.own_values + p * kTileRows;
      const int64_t count = std::min(kForwardKeys, own.keys - p), stride = c.own * kTileRows;
      if (everyone) {
        attend(groups, panel, first, keys, values, stride, count, c.width, Everyone{}, dropout, nullptr,
               c.own_column + p);
      } else {
        const OwnOnly sees{lanes.mine + first, lanes.last_key + first, static_cast<std::int32_t>(p)};
        attend(groups, panel, first, keys, values, stride, count, c.width, sees, dropout, nullptr, c.own_column + p);
      }
    }
  }
}

// out and the log-sum-exp of the rows of a panel.
template <class T>
void finish_rows(const Call& c, const RowBlock& rows, const RowPanel& panel) {
  float factors[kPanel], lse[kPanel], lacking[kPanel];
  for (int n = 0; n < 2; ++n) {
    const I8 seen = panel.sum[n] != 0.0f;
    const V8 sum = select(seen, panel.sum[n], broadcast(1.0f));
    const V8 top = select(seen, panel.top[n], zero());
    const V8 log_sum = log(sum);
    const V8 total = top + log_sum;
    store(factors + 8 * n, static_cast<float>(c.keep_scale) / sum);
    store(lse + 8 * n, select(seen, total, broadcast(-kInfinity)));
    // What the rounding of the sum lost; the backward recomputes the weights from both.
    store(lacking + 8 * n, (top - total) + log_sum);
  }
  store_rows(c, panel.out, factors, rows, static_cast<T*>(c.out));
  for (int64_t i = 0; i < rows.count; ++i) {
    c.lse[rows.index[i]] = lse[i];
    if (c.lse_correction != nullptr) c.lse_correction[rows.index[i]] = lacking[i];
  }
}

template <class T>
void forward_task(const Call& c, const Task& task, const ForwardScratch& scratch) {
  const Segment segment = segment_of(c, task.b);
  const SharedKeys shared = shared_keys(c, task.b, segment.count, scratch.list, scratch.visible);
  pack_keys(shared_base<T>(c.k, c.k_strides, task.b, segment.start, task.h), c.k_strides[1], c.k_strides[3],
            shared.list, shared.count, c.width, scratch.keys, nullptr);
  pack_keys(shared_base<T>(c.v, c.v_strides, task.b, segment.start, task.h), c.v_strides[1], c.v_strides[3],
            shared.list, shared.count, c.width, nullptr, scratch.values);
  RowBlocks blocks(c, task, kPanel);
  OwnLanes lanes;
  Dropout dropout(c);
  int64_t packed = -1;
  for (int64_t first = task.first; first < task.last; first += kPanel) {
    blocks.advance();
    const RowBlock& rows = blocks.now();
    dropout.rows(rows);
    prefetch_rows<true>(c, static_cast<const T*>(c.out), rows, 0, kPanel);
    load_rows(c, static_cast<const T*>(c.q), c.q_strides, task.b, task.h, rows, blocks.next(),
              static_cast<float>(c.scale), scratch.q, nullptr);
    RowPanel panel{scratch.q, scratch.out, scratch.logits, shared.count > 0, {}, {}};
    if (!panel.fresh) std::fill_n(panel.out, c.width * kPanel, 0.0f);
    for (V8& top : panel.top) top = broadcast(-kInfinity);
    const int groups = static_cast<int>(ceil_div(rows.count, 8));
    for (int64_t j = 0; j < shared.count; j += kForwardKeys) {
      const float* keys = scratch.keys + j * c.width;
      const float* values = scratch.values + j * kTileRows;
      const int64_t count = std::min(kForwardKeys, shared.count - j), stride = shared.count * kTileRows;
      const int64_t* columns = shared.list == nullptr ? nullptr : shared.list + j;
      if (shared.visible == nullptr) {
        attend(groups, panel, 0, keys, values, stride, count, c.width, Everyone{}, dropout, columns,
               segment.start + j);
      } else {
        const MaskedShared sees{shared.visible + j * shared.pitch + first % sample_rows(c), shared.pitch};
        attend(groups, panel, 0, keys, values, stride, count, c.width, sees, dropout, columns,
               segment.start + j);
      }
      panel.fresh = false;
    }
    if (c.own > 0) attend_own<T>(c, task, rows, panel, lanes, dropout, scratch, packed);
    finish_rows<T>(c, rows, panel);
  }
}

template <class T>
int forward(const Call& c) {
  const int64_t most = most_keys(c);
  const Division division(c, kPanel);
  Arena measure(nullptr);
  ForwardScratch{c, most, measure};
  return for_each_task(c, c.batch * c.kv_heads * division.parts, measure.used(), [&](int64_t i, char* memory) {
    Arena arena(memory);
    forward_task<T>(c, division.task(c, i), ForwardScratch(c, most, arena));
  });
}

}  // namespace MINIDIFF_SIMD_NAMESPACE

#include "cpu/broadcast_attention_backward.h"

#endif  // MINIDIFF_FAST_CPU_BROADCAST_ATTENTION_KERNEL_H
