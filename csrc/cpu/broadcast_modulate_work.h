// How broadcast_modulate divides its work, and the parameters in force for each part of it; see
// broadcast_modulate_kernel.h.
#ifndef MINIDIFF_FAST_CPU_BROADCAST_MODULATE_WORK_H
#define MINIDIFF_FAST_CPU_BROADCAST_MODULATE_WORK_H

#include "minidiff_fast.h"
#include "simd.h"

#include <initializer_list>

namespace MINIDIFF_SIMD_NAMESPACE {
namespace modulate {

using Arguments = minidiff_fast_broadcast_modulate;
using Int = std::int64_t;

enum Norm : int { kNoNorm = 0, kLayer = 1, kRms = 2, kGroup = 3 };
enum Activation : int { kLinear = 0, kSilu = 1, kMish = 2 };

constexpr Int kPadding = 16;        // floats behind every buffer: whole vectors may be written at its end
constexpr Int kRowsPerSum = 32;     // rows that one float adds up before it goes to the next level
constexpr Int kFreeTile = 1024;     // elements of a tile where no norm decides

MINIDIFF_INLINE Int padded(Int n) { return (n + 2 * kPadding - 1) / kPadding * kPadding; }

template <bool kFull, class E>
MINIDIFF_INLINE V8 read(const E* p, Int n) {
  return kFull ? load(p) : load_partial(p, n);
}

template <bool kFull, class E>
MINIDIFF_INLINE void write(E* p, V8 x, Int n) {
  if (kFull) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

// body(true or false as a type, column, how many columns), over 0 .. width - 1 in eights and what is left.
struct Full {
  static constexpr bool value = true;
};
struct Part {
  static constexpr bool value = false;
};
template <class Body>
MINIDIFF_INLINE void columns(Int width, Body body) {
  Int i = 0;
  for (; i + 8 <= width; i += 8) body(Full{}, i, Int{8});
  if (i < width) body(Part{}, i, width - i);
}

// ------------------------------------------------------------------------------------------- shapes and buffers

struct Plan {
  const Arguments& a;
  Int block, blocks, runs;  // channels of a block; blocks; runs of samples
  bool per_row;             // statistics per token
  bool at_output;           // without an activation both places are one
  bool own;                 // parameters change from sample to sample
  Int repeat;               // columns of a channel

  explicit Plan(const Arguments& arguments) : a(arguments) {
    per_row = a.norm == kLayer || a.norm == kRms;
    at_output = a.at_output != 0 || a.activation == kLinear;
    own = a.own_shift != nullptr || a.own_scale != nullptr || a.own_gate != nullptr;
    repeat = a.channels_first && a.tokens > 1 ? a.tokens : 1;
    block = a.channels;
    if (a.norm == kGroup) {
      block = a.channels / a.groups;
    } else if (a.channels_first) {
      const Int fitting = kFreeTile / (a.tokens > 0 ? a.tokens : 1);
      block = fitting < 1 ? 1 : fitting < a.channels ? fitting : a.channels;
    }
    blocks = (a.channels + block - 1) / block;
    runs = (a.samples + a.sample_run - 1) / a.sample_run;
  }

  Int units() const { return a.conditions * blocks * runs; }
  Int tile() const { return padded(a.channels_first ? block * a.tokens : block * (a.norm == kGroup ? a.tokens : 1)); }
  Int line() const { return padded(block * repeat); }
  // Floats of working memory a thread; the order is that of Work.
  Int forward_floats() const { return 11 * padded(block) + 4 * line(); }
  Int backward_floats() const { return forward_floats() + tile() + 4 * line() + 4 * padded(block) + 5 * padded(block); }
};

// Where a tile lies.
struct Tile {
  Int rows, width, stride;
};

// What one unit works on, and its thread's buffers.
struct Work {
  const Plan& plan;
  Int b, first_channel, channels, block_index, first_sample, samples, run;
  float *zeros, *ones;                   // [block]
  float *s, *m, *g, *w, *c;              // [block]: shift, scale, gate, weight, bias in force
  float *channel[4];                     // [block]: P, Q, M, S
  float *buffer[4];                      // [block * repeat]: the same, repeated
  const float* column[4];                // what the loops read: buffer, or channel where nothing is repeated
  float* dxhat = nullptr;                // [tile]
  float* sums[4] = {};                   // [block * repeat]: D xhat, D, dy act(z), dy over a few rows
  float* totals[4] = {};                 // [block]: the same over a sample or the run
  float* gradients[5] = {};              // [block]: dshift, dscale, dgate, dweight, dbias over the run

  Work(const Plan& p, Int unit, float* memory, bool backward) : plan(p) {
    const Arguments& a = p.a;
    run = unit % p.runs;
    block_index = unit / p.runs % p.blocks;
    b = unit / (p.runs * p.blocks);
    first_channel = block_index * p.block;
    channels = p.block < a.channels - first_channel ? p.block : a.channels - first_channel;
    first_sample = run * a.sample_run;
    samples = a.sample_run < a.samples - first_sample ? a.sample_run : a.samples - first_sample;
    const auto take = [&memory](Int n) {
      float* taken = memory;
      memory += n;
      return taken;
    };
    const Int n = padded(p.block), line = p.line();
    for (float** each : {&zeros, &ones, &s, &m, &g, &w, &c}) *each = take(n);
    for (Int i = 0; i < 4; ++i) {
      channel[i] = take(n);
      buffer[i] = take(line);
      column[i] = p.repeat > 1 ? buffer[i] : channel[i];
    }
    for (Int i = 0; i < n; ++i) zeros[i] = 0.0f, ones[i] = 1.0f;
    if (!backward) return;
    dxhat = take(p.tile());
    for (float*& each : sums) each = take(line);
    for (float*& each : totals) each = take(n);
    for (float*& each : gradients) each = take(n);
  }

  Tile tile() const {
    const Arguments& a = plan.a;
    if (a.channels_first) return {1, channels * a.tokens, 0};
    return {a.tokens, channels, a.channels};
  }
  Int offset(Int k) const {
    const Arguments& a = plan.a;
    const Int sample = b * a.samples + k;
    return a.channels_first ? (sample * a.channels + first_channel) * a.tokens
                            : sample * a.tokens * a.channels + first_channel;
  }
  Int statistics(Int k) const {
    const Arguments& a = plan.a;
    return (b * a.samples + k) * (plan.per_row ? a.tokens : a.groups) + (plan.per_row ? 0 : block_index);
  }
};

// A channel's number into each of its T columns; vectors overlap the next channel's, which comes later.
inline void repeat_tokens(const float* from, Int channels, Int tokens, float* to) {
  for (Int i = 0; i < channels; ++i) {
    const V8 value = broadcast(from[i]);
    for (Int j = 0; j < tokens; j += 8) store(to + i * tokens + j, value);
  }
}

// Four floats from each of two places.
MINIDIFF_INLINE V8 load_halves(const float* low, const float* high) {
#if defined(__AVX2__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
#else
  return V8{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#endif
}

// Adds each channel's T columns to its total, eight channels at a time (sixteen where two fit into a vector).
inline void add_tokens(const float* from, Int channels, Int tokens, float* to) {
  const Int tail = tokens % 8;
  const I8 mask = first_lanes(tail);
  const auto channel_sum = [&](Int i) {
    const float* p = from + i * tokens;
    V8 sum = tail ? as_float(as_int(load(p + tokens - tail)) & mask) : zero();
    for (Int j = 0; j + 8 <= tokens; j += 8) sum += load(p + j);
    return sum;
  };
  Int i = 0;
  V8 r[8];
  if (tokens <= 4) {
    const I8 both = (iota() & 3) < (I8{} + static_cast<std::int32_t>(tokens));
    for (; i + 16 <= channels; i += 16) {
      for (Int j = 0; j < 8; ++j) {
        r[j] = load_halves(from + (i + j) * tokens, from + (i + j + 8) * tokens);
        if (tokens < 4) r[j] = as_float(as_int(r[j]) & both);
      }
      transpose(r);
      store(to + i, load(to + i) + ((r[0] + r[2]) + (r[1] + r[3])));
      store(to + i + 8, load(to + i + 8) + ((r[4] + r[6]) + (r[5] + r[7])));
    }
  }
  for (; i + 8 <= channels; i += 8) {
    for (Int j = 0; j < 8; ++j) r[j] = channel_sum(i + j);
    transpose(r);
    store(to + i, load(to + i) + (((r[0] + r[4]) + (r[2] + r[6])) + ((r[1] + r[5]) + (r[3] + r[7]))));
  }
  for (; i < channels; ++i) to[i] += horizontal_sum(channel_sum(i));
}

// Puts the parameters of condition b (and of sample k) into force.
inline void prepare(Work& work, Int k, bool first) {
  const Plan& plan = work.plan;
  const Arguments& a = plan.a;
  const Int shared = work.b * a.channels + work.first_channel;
  const Int single = (work.b * a.samples + k) * a.channels + work.first_channel;
  const auto at = [&work](const float* p, Int offset) { return p ? p + offset : work.zeros; };
  const float *shift = at(a.shift, shared), *own_shift = at(a.own_shift, single);
  const float *scale = at(a.scale, shared), *own_scale = at(a.own_scale, single);
  const float *gate = at(a.gate, shared), *own_gate = at(a.own_gate, single);
  const float* weight = a.weight ? a.weight + work.first_channel : work.ones;
  const float* bias = at(a.bias, work.first_channel);
  const float m0 = (a.scale || a.own_scale) && !a.one_plus_scale ? 0.0f : 1.0f;
  const float g0 = a.gate || a.own_gate ? 0.0f : 1.0f;
  columns(work.channels, [&](auto full, Int i, Int n) {
    constexpr bool kFull = decltype(full)::value;
    const V8 s = read<kFull>(shift + i, n) + read<kFull>(own_shift + i, n);
    const V8 m = m0 + (read<kFull>(scale + i, n) + read<kFull>(own_scale + i, n));
    const V8 g = g0 + (read<kFull>(gate + i, n) + read<kFull>(own_gate + i, n));
    const V8 w = read<kFull>(weight + i, n), c = read<kFull>(bias + i, n);
    store(work.s + i, s), store(work.m + i, m), store(work.g + i, g), store(work.w + i, w), store(work.c + i, c);
    store(work.channel[0] + i, plan.at_output ? w * m : w);
    store(work.channel[1] + i, plan.at_output ? fma(c, m, s) : c);
    store(work.channel[2] + i, plan.at_output ? g : g * m);
    store(work.channel[3] + i, plan.at_output ? zero() : g * s);
  });
  if (plan.repeat <= 1) return;
  for (Int i = 0; i < 4; ++i) {
    const bool of_the_condition = plan.at_output ? i == 3 : i < 2;
    if (first || !of_the_condition) repeat_tokens(work.channel[i], work.channels, plan.repeat, work.buffer[i]);
  }
}

}  // namespace modulate
}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_BROADCAST_MODULATE_WORK_H
