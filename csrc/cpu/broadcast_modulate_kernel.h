// broadcast_modulate on eight floats at a time; the formula is in minidiff_fast/ops/broadcast_modulate.py.
//
// Every layout becomes tiles of `rows` runs of `width` contiguous elements with parameters per column:
//   channels last    a token is a row, a column a channel;
//   channels first   a block of channels is one row of channels * T elements, and what belongs to a channel is
//                    repeated T times in a small buffer, once per condition (per sample if it has parameters of its
//                    own), so that T = 4 or 5 fills vectors as well as T = 16 does.
// A unit of work is (condition, block of channels, run of samples): statistics and results of a tile while it is in
// the first cache, gradients of parameters summed over the run in column buffers.
//
// With xhat the normalised x, everything is
//   z = xhat P + Q,  y = act(z) M + S + residual
//   activation at the norm:    P = weight,    Q = bias,          M = gate m,  S = gate s
//   activation at the output:  P = weight m,  Q = bias m + s,    M = gate,    S = 0
// and with D = dy M act'(z) the gradients of P, Q, M, S are the sums of D xhat, D, dy act(z) and dy.
#ifndef MINIDIFF_FAST_CPU_BROADCAST_MODULATE_KERNEL_H
#define MINIDIFF_FAST_CPU_BROADCAST_MODULATE_KERNEL_H

#include "broadcast_modulate_work.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace MINIDIFF_SIMD_NAMESPACE {
namespace modulate {

// ------------------------------------------------------------------------------------------------- activations

template <int kActivation>
MINIDIFF_INLINE V8 activate(V8 z) {
  if (kActivation == kSilu) {
    const V8 e = exp_weight(-abs(z));
    return z * select(z < 0.0f, e, broadcast(1.0f)) / (1.0f + e);
  }
  if (kActivation == kMish) {
    const V8 e = exp_weight(min(broadcast(20.0f), z));
    const V8 n = e * (e + 2.0f);
    return z * (n / (n + 2.0f));
  }
  return z;
}

// act(z), and act'(z) from the same exponential and the same division.
template <int kActivation>
MINIDIFF_INLINE V8 activate(V8 z, V8* slope) {
  if (kActivation == kSilu) {
    const V8 e = exp_weight(-abs(z));
    const V8 large = 1.0f / (1.0f + e), small = e * large;
    const V8 s = select(z < 0.0f, small, large), rest = select(z < 0.0f, large, small);
    *slope = s * fma(z, rest, broadcast(1.0f));
    return z * s;
  }
  if (kActivation == kMish) {
    const V8 bounded = min(broadcast(20.0f), z);
    const V8 e = exp_weight(bounded);
    const V8 n = e * (e + 2.0f);
    const V8 inverse = 1.0f / (n + 2.0f), t = n * inverse;
    *slope = fma(bounded * (4.0f * e), (e + 1.0f) * inverse * inverse, t);
    return z * t;
  }
  *slope = broadcast(1.0f);
  return z;
}

// ------------------------------------------------------------------------------------------------------ forward

struct Moments {
  float mean, rstd;
};

template <class E>
inline Moments moments(const E* x, Tile t, bool centred, float eps) {
  const double count = static_cast<double>(t.rows) * static_cast<double>(t.width);
  float mean = 0.0f;
  if (centred) {
    V8 sum[2] = {zero(), zero()};
    for (Int r = 0; r < t.rows; ++r) {
      Int i = 0;
      const E* row = x + r * t.stride;
      for (; i + 16 <= t.width; i += 16) sum[0] += load(row + i), sum[1] += load(row + i + 8);
      if (i + 8 <= t.width) sum[0] += load(row + i), i += 8;
      if (i < t.width) sum[1] += load_partial(row + i, t.width - i);
    }
    mean = static_cast<float>(horizontal_sum(sum[0] + sum[1]) / count);
  }
  V8 square[2] = {zero(), zero()};
  for (Int r = 0; r < t.rows; ++r) {
    Int i = 0;
    const E* row = x + r * t.stride;
    const auto add = [&](V8& to, V8 value) { to = fma(value, value, to); };
    for (; i + 16 <= t.width; i += 16) add(square[0], load(row + i) - mean), add(square[1], load(row + i + 8) - mean);
    if (i + 8 <= t.width) add(square[0], load(row + i) - mean), i += 8;
    if (i < t.width) {
      const V8 centred_tail = load_partial(row + i, t.width - i) - mean;
      add(square[1], select(first_lanes(t.width - i), centred_tail, zero()));
    }
  }
  const double variance = horizontal_sum(square[0] + square[1]) / count;
  return {mean, static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(eps)))};
}

template <class E, int kActivation, bool kResidual>
inline void forward_tile(const Work& work, const E* x, const E* residual, E* y, Tile t, Moments moment) {
  const float *p = work.column[0], *q = work.column[1], *m = work.column[2], *s = work.column[3];
  for (Int r = 0; r < t.rows; ++r) {
    const Int at = r * t.stride;
    columns(t.width, [&](auto full, Int i, Int n) {
      constexpr bool kFull = decltype(full)::value;
      const V8 xhat = (read<kFull>(x + at + i, n) - moment.mean) * moment.rstd;
      const V8 z = fma(xhat, load(p + i), load(q + i));
      V8 out = fma(activate<kActivation>(z), load(m + i), load(s + i));
      if (kResidual) out += read<kFull>(residual + at + i, n);
      write<kFull>(y + at + i, out, n);
    });
  }
}

template <class E, int kActivation, bool kResidual>
inline void forward_unit(Work& work) {
  const Plan& plan = work.plan;
  const Arguments& a = plan.a;
  const Tile whole = work.tile();
  const Tile part = plan.per_row ? Tile{1, whole.width, 0} : whole;
  const Int parts = plan.per_row ? a.tokens : 1;
  for (Int k = work.first_sample; k < work.first_sample + work.samples; ++k) {
    const bool first = k == work.first_sample;
    if (first || plan.own) prepare(work, k, first);
    for (Int j = 0; j < parts; ++j) {
      const Int at = work.offset(k) + j * whole.stride;
      const E* x = static_cast<const E*>(a.x) + at;
      Moments moment{0.0f, 1.0f};
      if (a.norm != kNoNorm) {
        moment = moments(x, part, a.norm != kRms, a.eps);
        if (a.mean) a.mean[work.statistics(k) + j] = moment.mean;
        a.rstd[work.statistics(k) + j] = moment.rstd;
      }
      const E* residual = kResidual ? static_cast<const E*>(a.residual) + at : nullptr;
      forward_tile<E, kActivation, kResidual>(work, x, residual, static_cast<E*>(a.y) + at, part, moment);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- backward

// Which sums the wanted gradients are made of.
struct Wanted {
  bool affine, outer;  // D xhat and D; dy act(z) and dy

  explicit Wanted(const Plan& plan) {
    const Arguments& a = plan.a;
    const bool film = a.dshift || a.dscale || a.down_shift || a.down_scale;
    const bool gate = a.dgate || a.down_gate;
    affine = a.dweight || a.dbias || (plan.at_output && film);
    outer = gate || (!plan.at_output && film);
  }
};

// The column sums, and dxhat = D P with its two sums (normalised) or dx itself (not).
template <class E, int kActivation, bool kAffine, bool kOuter>
inline void backward_rows(const Work& work, const E* x, const E* dy, E* dx, float* dxhat, Tile t, Moments moment,
                          bool normalised, V8 (&inner)[2]) {
  const float *p = work.column[0], *q = work.column[1], *m = work.column[2];
  float *sum0 = work.sums[0], *sum1 = work.sums[1], *sum2 = work.sums[2], *sum3 = work.sums[3];
  V8 plain = inner[0], weighted = inner[1];
  for (Int r = 0; r < t.rows; ++r) {
    const Int at = r * t.stride;
    columns(t.width, [&](auto full, Int i, Int n) {
      constexpr bool kFull = decltype(full)::value;
      const V8 xhat = (read<kFull>(x + at + i, n) - moment.mean) * moment.rstd;
      const V8 gradient = read<kFull>(dy + at + i, n);
      const V8 scale = load(p + i);
      V8 slope;
      const V8 value = activate<kActivation>(fma(xhat, scale, load(q + i)), &slope);
      const V8 d = gradient * load(m + i) * slope;
      if (kAffine) {
        store(sum0 + i, fma(d, xhat, load(sum0 + i)));
        store(sum1 + i, load(sum1 + i) + d);
      }
      if (kOuter) {
        store(sum2 + i, fma(gradient, value, load(sum2 + i)));
        store(sum3 + i, load(sum3 + i) + gradient);
      }
      V8 inward = d * scale;
      if (normalised) {
        if (!kFull) inward = select(first_lanes(n), inward, zero());
        plain += inward;
        weighted = fma(inward, xhat, weighted);
        store(dxhat + r * t.width + i, inward);
      } else if (dx) {
        write<kFull>(dx + at + i, inward, n);
      }
    });
  }
  inner[0] = plain, inner[1] = weighted;
}

template <class E>
inline void backward_norm(const E* x, const float* dxhat, E* dx, Tile t, Moments moment, bool centred,
                          const V8 (&inner)[2]) {
  const double count = static_cast<double>(t.rows) * static_cast<double>(t.width);
  const float plain = centred ? static_cast<float>(horizontal_sum(inner[0]) / count) : 0.0f;
  const float weighted = static_cast<float>(horizontal_sum(inner[1]) / count);
  for (Int r = 0; r < t.rows; ++r) {
    const Int at = r * t.stride;
    columns(t.width, [&](auto full, Int i, Int n) {
      constexpr bool kFull = decltype(full)::value;
      const V8 xhat = (read<kFull>(x + at + i, n) - moment.mean) * moment.rstd;
      const V8 centred_gradient = load(dxhat + r * t.width + i) - plain;
      write<kFull>(dx + at + i, moment.rstd * fma(xhat, broadcast(-weighted), centred_gradient), n);
    });
  }
}

inline void clear(float* const* buffers, Int count, Int n) {
  for (Int j = 0; j < count; ++j) {
    for (Int i = 0; i < n; i += 8) store(buffers[j] + i, zero());
  }
}

// The column sums go to the totals and start again.
inline void flush(const Work& work, Wanted wanted) {
  const Plan& plan = work.plan;
  for (Int j = wanted.affine ? 0 : 2; j < (wanted.outer ? 4 : 2); ++j) {
    if (plan.repeat > 1) {
      add_tokens(work.sums[j], work.channels, plan.repeat, work.totals[j]);
    } else {
      for (Int i = 0; i < work.channels; i += 8) {
        store(work.totals[j] + i, load(work.totals[j] + i) + load(work.sums[j] + i));
      }
    }
    clear(work.sums + j, 1, work.channels * plan.repeat);
  }
}

// Gradients of the parameters out of the totals of sample k (k < 0: of the whole run, no parameter of its own).
inline void settle(const Work& work, Wanted wanted, Int k) {
  const Plan& plan = work.plan;
  const Arguments& a = plan.a;
  const Int single = (work.b * a.samples + k) * a.channels + work.first_channel;
  float* const down[3] = {a.down_shift, a.down_scale, a.down_gate};
  columns(work.channels, [&](auto full, Int i, Int n) {
    const V8 t0 = load(work.totals[0] + i), t1 = load(work.totals[1] + i);
    const V8 t2 = load(work.totals[2] + i), t3 = load(work.totals[3] + i);
    const V8 s = load(work.s + i), m = load(work.m + i), g = load(work.g + i);
    V8 made[5];
    if (plan.at_output) {
      made[0] = t1, made[1] = fma(load(work.w + i), t0, load(work.c + i) * t1), made[2] = t2;
      made[3] = m * t0, made[4] = m * t1;
    } else {
      made[0] = g * t3, made[1] = g * t2, made[2] = fma(m, t2, s * t3);
      made[3] = t0, made[4] = t1;
    }
    for (Int j = 0; j < 5; ++j) store(work.gradients[j] + i, load(work.gradients[j] + i) + made[j]);
    for (Int j = 0; j < 3 && k >= 0; ++j) {
      if (down[j]) write<decltype(full)::value>(down[j] + single + i, made[j], n);
    }
  });
  if (k >= 0) clear(work.totals, wanted.affine || wanted.outer ? 4 : 0, work.channels);
}

template <class E, int kActivation, bool kAffine, bool kOuter>
inline void backward_unit(Work& work, Wanted wanted) {
  const Plan& plan = work.plan;
  const Arguments& a = plan.a;
  const Tile whole = work.tile();
  const bool normalised = a.norm != kNoNorm && a.dx;
  const Int parts = plan.per_row ? a.tokens : 1;
  const Int rows = plan.per_row ? 1 : whole.rows;
  Int pending = 0;
  clear(work.sums, 4, plan.block * plan.repeat);
  clear(work.totals, 4, plan.block);
  clear(work.gradients, 5, plan.block);
  for (Int k = work.first_sample; k < work.first_sample + work.samples; ++k) {
    const bool first = k == work.first_sample;
    if (first || plan.own) prepare(work, k, first);
    for (Int j = 0; j < parts; ++j) {
      const Int at = work.offset(k) + j * whole.stride;
      const E *x = static_cast<const E*>(a.x) + at, *dy = static_cast<const E*>(a.dy) + at;
      E* dx = a.dx ? static_cast<E*>(a.dx) + at : nullptr;
      Moments moment{0.0f, 1.0f};
      if (a.norm != kNoNorm) {
        moment = {a.mean ? a.mean[work.statistics(k) + j] : 0.0f, a.rstd[work.statistics(k) + j]};
      }
      V8 inner[2] = {zero(), zero()};
      for (Int r = 0; r < rows; r += kRowsPerSum) {
        const Tile t{rows - r < kRowsPerSum ? rows - r : kRowsPerSum, whole.width, whole.stride};
        const Int skip = r * whole.stride;
        if (pending + t.rows > kRowsPerSum) flush(work, wanted), pending = 0;
        backward_rows<E, kActivation, kAffine, kOuter>(work, x + skip, dy + skip, dx ? dx + skip : nullptr,
                                                       work.dxhat + r * whole.width, t, moment, normalised, inner);
        pending += t.rows;
      }
      if (normalised) backward_norm(x, work.dxhat, dx, {rows, whole.width, whole.stride}, moment, a.norm != kRms, inner);
    }
    if (plan.own) flush(work, wanted), settle(work, wanted, k), pending = 0;
  }
  if (!plan.own) flush(work, wanted), settle(work, wanted, -1);
  float* const partial[5] = {a.dshift, a.dscale, a.dgate, a.dweight, a.dbias};
  const Int to = (work.b * plan.runs + work.run) * a.channels + work.first_channel;
  for (Int j = 0; j < 5; ++j) {
    if (partial[j]) std::memcpy(partial[j] + to, work.gradients[j], sizeof(float) * work.channels);
  }
}

// ----------------------------------------------------------------------------------------------------- launching

// unit(work) for every unit of work, on a.threads threads, each with its own working memory.
template <class Unit>
inline int for_each_unit(const Plan& plan, bool backward, Unit unit) {
  const Int units = plan.units();
  if (units == 0) return MINIDIFF_FAST_OK;
  const int threads = static_cast<int>(plan.a.threads < units ? plan.a.threads : units);
  const Int floats = backward ? plan.backward_floats() : plan.forward_floats();
  float* memory = static_cast<float*>(std::malloc(sizeof(float) * static_cast<std::size_t>(floats * threads + kPadding)));
  if (memory == nullptr) return MINIDIFF_FAST_ENOMEM;
  float* aligned = memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) / sizeof(float);
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
  for (Int i = 0; i < units; ++i) {
#if defined(_OPENMP)
    const Int thread = omp_get_thread_num();
#else
    const Int thread = 0;
#endif
    Work work(plan, i, aligned + thread * floats, backward);
    unit(work);
  }
  std::free(memory);
  return MINIDIFF_FAST_OK;
}

template <class E, int kActivation>
inline int forward_of(const Plan& plan) {
  if (plan.a.residual) return for_each_unit(plan, false, [](Work& w) { forward_unit<E, kActivation, true>(w); });
  return for_each_unit(plan, false, [](Work& w) { forward_unit<E, kActivation, false>(w); });
}

template <class E, int kActivation>
inline int backward_of(const Plan& plan) {
  const Wanted wanted(plan);
  if (wanted.affine && wanted.outer) {
    return for_each_unit(plan, true, [=](Work& w) { backward_unit<E, kActivation, true, true>(w, wanted); });
  }
  if (wanted.affine) {
    return for_each_unit(plan, true, [=](Work& w) { backward_unit<E, kActivation, true, false>(w, wanted); });
  }
  if (wanted.outer) {
    return for_each_unit(plan, true, [=](Work& w) { backward_unit<E, kActivation, false, true>(w, wanted); });
  }
  return for_each_unit(plan, true, [=](Work& w) { backward_unit<E, kActivation, false, false>(w, wanted); });
}

template <class E>
inline int run(const Arguments& a, bool backward) {
  const Plan plan(a);
  if (a.activation == kSilu) return backward ? backward_of<E, kSilu>(plan) : forward_of<E, kSilu>(plan);
  if (a.activation == kMish) return backward ? backward_of<E, kMish>(plan) : forward_of<E, kMish>(plan);
  return backward ? backward_of<E, kLinear>(plan) : forward_of<E, kLinear>(plan);
}

}  // namespace modulate

// The arguments have been checked.
inline int broadcast_modulate(const minidiff_fast_broadcast_modulate& a, bool backward) {
  return a.is_bfloat16 ? modulate::run<bfloat16>(a, backward) : modulate::run<float>(a, backward);
}

}  // namespace MINIDIFF_SIMD_NAMESPACE

#endif  // MINIDIFF_FAST_CPU_BROADCAST_MODULATE_KERNEL_H
