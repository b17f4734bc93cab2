// Gradients of the activation and of the pre-activation, spread from the bins over the positions.
#pragma once
#include "lls/cpu/activation.h"

namespace lgk::cpu::LGK_ISA {

// f(position pointer, n, gradient) for every vector of one plane; `segments` holds the gradient of each segment.
template <class T, class F>
inline void over_plane(T* z, const Axis& rows, const Axis& columns, const RowLanes& lanes, const float* segments,
                       const F& f) {
  constexpr int kChunk = 8;  // vectors: memory is taken in its order
  for (int64_t s = 0; s < rows.segments; ++s) {
    const float* of_row = segments + s * columns.segments;
    for (int64_t start = 0; start < lanes.width; start += kChunk * V) {
      const int64_t stop = smaller(start + kChunk * V, lanes.width);
      vf g[kChunk];
      for (int64_t w = start; w < stop; w += V) {
        const vi segment = lanes.segment[w / V];
        vf& of_lanes = g[(w - start) / V];
        if (lanes.few)
          of_lanes = look_up(load_some(of_row, columns.segments), segment);
        else
          for (int l = 0; l < V; ++l) of_lanes[l] = of_row[segment[l]];
      }
      for (int64_t h = rows.bound[s] / lanes.rows; h < rows.bound[s + 1] / lanes.rows; ++h)
        for (int64_t w = start; w < stop; w += V) f(z + h * lanes.width + w, smaller(V, stop - w), g[(w - start) / V]);
    }
  }
}

template <class T, class F>
inline void over_channels(T* z, int64_t channels, int64_t n, const Axis& rows, const Axis& columns, const vf* segments,
                          const F& f) {
  for (int64_t s = 0; s < rows.segments; ++s)
    for (int64_t h = rows.bound[s]; h < rows.bound[s + 1]; ++h)
      for (int64_t t = 0; t < columns.segments; ++t) {
        const vf g = segments[s * columns.segments + t];
        for (int64_t w = columns.bound[t]; w < columns.bound[t + 1]; ++w)
          f(z + (h * columns.size + w) * channels, n, g);
      }
}

inline int64_t gradient_scratch(const Activation& a, const Axis& rows, const Axis& columns) {
  return rows.segments * columns.segments * (a.channels_last ? V : 1);
}

inline int expand_grad(const Activation& out, const Axis& rows, const Axis& columns, const float* grad,
                       const float* scale, bool per_row, int threads) {
  return for_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = out.channels, area = out.height * out.width, bins = rows.pool * columns.pool;
    const int64_t groups = out.channels_last ? (channels + V - 1) / V : channels;
    Scratch scratch(gradient_scratch(out, rows, columns), threads), map(RowLanes::scratch(columns), 1);
    if (!scratch || !map) return 1;
    const RowLanes lanes(rows, columns, map.of(0));
    if (!out.channels_last && rows.pool == rows.size && columns.pool == columns.size) {  // every bin is one position
      const int64_t size = channels * area;
      parallel(out.batch, elements(out), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b)
          for (int64_t i = 0; i < size; i += V) {
            const int64_t n = smaller(V, size - i), at = b * size + i;
            store_some(static_cast<T*>(out.data) + at, load_some(grad + at, n) * scale[per_row ? b : 0], n);
          }
      });
      return 0;
    }
    const auto write = [](T* p, int64_t n, vf g) { store_some(p, g, n); };
    parallel(out.batch * groups, elements(out), threads, [&](int64_t begin, int64_t end, int thread) {
      float* segments = scratch.of(thread);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / groups, c = i % groups * (out.channels_last ? V : 1), at = b * channels + c;
        const float weight = scale[per_row ? b : 0];
        T* data = static_cast<T*>(out.data);
        if (out.channels_last) {
          const int64_t n = smaller(V, channels - c);
          vf* wide = reinterpret_cast<vf*>(segments);
          from_bins(grad + at * bins, rows, columns, splat(weight), n, wide);
          over_channels(data + b * area * channels + c, channels, n, rows, columns, wide, write);
        } else {
          from_bins(grad + at * bins, rows, columns, weight, segments);
          over_plane(data + at * area, rows, columns, lanes, segments, write);
        }
      }
    });
    return 0;
  });
}

inline int grad_preactivation(const Activation& a, const Axis& rows, const Axis& columns, const Norm& norm,
                              const float* grad, const float* grad_gamma, const float* grad_beta, float scale,
                              int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = a.channels, area = a.height * a.width, bins = rows.pool * columns.pool;
    const int64_t groups = a.channels_last ? (channels + V - 1) / V : channels;
    const float inverse = 1.f / static_cast<float>(a.batch * area);
    Scratch scratch(gradient_scratch(a, rows, columns), threads), map(RowLanes::scratch(columns), 1);
    if (!scratch || !map) return 1;
    const RowLanes lanes(rows, columns, map.of(0));
    parallel(a.batch * groups, elements(a), threads, [&](int64_t begin, int64_t end, int thread) {
      float* segments = scratch.of(thread);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / groups, c = i % groups * (a.channels_last ? V : 1), at = b * channels + c;
        T* data = static_cast<T*>(a.data);
        const int64_t n = a.channels_last ? smaller(V, channels - c) : 1;
        const vf rstd = a.channels_last ? load_some(norm.rstd + c, n) : splat(norm.rstd[c]);
        const vf dgamma = a.channels_last ? load_some(grad_gamma + c, n) : splat(grad_gamma[c]);
        const vf dbeta = a.channels_last ? load_some(grad_beta + c, n) : splat(grad_beta[c]);
        const Unit unit = a.channels_last ? unit_of_channels(norm, c, n) : unit_of_channel(norm, c);
        const vf k = unit.gain * scale, offset = k * dbeta * inverse, along = k * rstd * dgamma * inverse;
        const auto update = [&](T* p, int64_t m, vf g) {
          const vf d = unit.centred(load_some(p, m)), lambda = unit.lambda(unit.affine(d));
          store_some(p, lambda * g - (offset + d * along), m);
        };
        if (a.channels_last) {
          vf* wide = reinterpret_cast<vf*>(segments);
          from_bins(grad + at * bins, rows, columns, k, n, wide);
          over_channels(data + b * area * channels + c, channels, n, rows, columns, wide, update);
        } else {
          from_bins(grad + at * bins, rows, columns, k[0], segments);
          over_plane(data + at * area, rows, columns, lanes, segments, update);
        }
      }
    });
    return 0;
  });
}

// z (B, N): the two column sums, then dz; `grad` (B, N) is already unpooled.
inline int linear_grad_preactivation(const Activation& a, const Norm& norm, const float* grad, float* grad_gamma,
                                     float* grad_beta, float* grad_bias, float scale, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t width = a.channels;
    const float inverse = 1.f / static_cast<float>(a.batch);
    parallel((width + V - 1) / V, elements(a), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t c = begin * V; c < smaller(end * V, width); c += V) {
        const int64_t n = smaller(V, width - c);
        const Unit unit = unit_of_channels(norm, c, n);
        const vf rstd = load_some(norm.rstd + c, n);
        T* z = static_cast<T*>(a.data) + c;
        vf dgamma = {}, dbeta = {};
        for (int64_t b = 0; b < a.batch; ++b) {
          const vf d = unit.centred(load_some(z + b * width, n));
          const vf g = unit.lambda(unit.affine(d)) * load_some(grad + b * width + c, n);
          dgamma += g * d;
          dbeta += g;
        }
        dgamma *= rstd;
        store_some(grad_gamma + c, dgamma, n);
        store_some(grad_beta + c, dbeta, n);
        store_some(grad_bias + c, vf{}, n);
        const vf k = unit.gain * scale, offset = dbeta * inverse, along = rstd * dgamma * inverse;
        for (int64_t b = 0; b < a.batch; ++b) {
          const vf d = unit.centred(load_some(z + b * width, n));
          const vf g = unit.lambda(unit.affine(d)) * load_some(grad + b * width + c, n);
          store_some(z + b * width, k * (g - (offset + d * along)), n);
        }
      }
    });
    return 0;
  });
}

}  // namespace lgk::cpu::LGK_ISA
