// Passes over an activation: format, pooling, and normalise-activate-pool.
// Planes (NCHW) run one (sample, channel) at a time with lanes along a row; NHWC runs one (sample, V channels) at a
// time with lanes along the channels.
#pragma once
#include "common/cpu/batch_norm.h"
#include "common/cpu/parallel.h"
#include "lls/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

inline int64_t elements(const Activation& a) { return a.batch * a.channels * a.height * a.width; }

// How the vectors of a plane meet its column segments. Rows narrower than a vector are folded into one, where no
// segment boundary is cut by it; `segment` is the column segment of each lane of the (folded) row.
struct RowLanes {
  int64_t rows = 1, width;  // rows merged into one, and its width
  vi* segment;
  bool few;  // the column segments fit into one vector
  static int64_t scratch(const Axis& c) { return ((c.size < V ? V : c.size) / V + 1) * V; }
  int64_t padded() const { return (width + V - 1) / V * V; }

  RowLanes(const Axis& r, const Axis& c, float* memory)
      : width(c.size), segment(reinterpret_cast<vi*>(memory)), few(c.segments <= V) {
    bool fold = width < V && V % width == 0;
    for (int64_t s = 0; s <= r.segments && fold; ++s) fold = r.bound[s] % (V / width) == 0;
    if (fold) rows = V / width, width = V;
    for (int64_t at = 0; at < width; at += V)
      for (int64_t l = 0, s = 0; l < V; ++l) {
        const int64_t column = (at + l) % c.size;
        if (column < c.bound[s]) s = 0;
        while (s + 1 < c.segments && column >= c.bound[s + 1]) ++s;
        segment[at / V][l] = static_cast<int32_t>(s);
      }
  }
};

// segments[i * c.segments + t] = the sum of the lanes of row i of `sums` (count, width) that lie in column segment t.
// V rows are turned at a time, so that lanes are added as vectors.
inline void add_lanes(const float* sums, int64_t count, const RowLanes& lanes, const Axis& c, float* segments,
                      vf* totals) {
  const int64_t padded = lanes.padded();
  for (int64_t i = 0; i < count; i += V) {
    const int64_t m = smaller(V, count - i);
    for (int64_t t = 0; t < c.segments; ++t) totals[t] = vf{};
    for (int64_t w = 0; w < lanes.width; w += V) {
      vf row[V];
      for (int64_t l = 0; l < V; ++l) row[l] = l < m ? load(sums + (i + l) * padded + w) : vf{};
      transpose(row);
      int32_t to[V];
      std::memcpy(to, &lanes.segment[w / V], sizeof to);
      vf run = row[0];
      for (int64_t l = 1; l < smaller(V, lanes.width - w); ++l) {
        if (to[l] == to[l - 1]) {
          run += row[l];
        } else {
          totals[to[l - 1]] += run;
          run = row[l];
        }
      }
      totals[to[smaller(V, lanes.width - w) - 1]] += run;
    }
    for (int64_t t = 0; t < c.segments; ++t)
      for (int64_t l = 0; l < m; ++l) segments[(i + l) * c.segments + t] = totals[t][l];
  }
}

inline bool tiles(const Axis& r, const Axis& c) { return r.size % r.pool == 0 && c.size % c.pool == 0; }

// Sums over the segments of one plane -> sums over bins, times `weight`.
inline void to_bins(const float* segments, const Axis& r, const Axis& c, bool average, float weight, float* bins) {
  if (tiles(r, c)) {
    const float factor = average ? r.inverse[0] * c.inverse[0] : weight;
    for (int64_t i = 0; i < r.pool * c.pool; ++i) bins[i] = segments[i] * factor;
    return;
  }
  for (int64_t i = 0; i < r.pool; ++i)
    for (int64_t j = 0; j < c.pool; ++j) {
      float total = 0;
      for (int64_t s = r.first[i]; s < r.last[i]; ++s)
        for (int64_t t = c.first[j]; t < c.last[j]; ++t) total += segments[s * c.segments + t];
      bins[i * c.pool + j] = total * (average ? r.inverse[i] * c.inverse[j] : weight);
    }
}

// The adjoint: each segment receives the sum over its bins of weight * grad / area.
inline void from_bins(const float* grad, const Axis& r, const Axis& c, float weight, float* segments) {
  if (tiles(r, c)) {
    const float factor = r.inverse[0] * c.inverse[0] * weight;
    for (int64_t i = 0; i < r.pool * c.pool; ++i) segments[i] = grad[i] * factor;
    return;
  }
  for (int64_t s = 0; s < r.segments; ++s)
    for (int64_t t = 0; t < c.segments; ++t) {
      float total = 0;
      for (int64_t i = r.low[s]; i < r.high[s]; ++i)
        for (int64_t j = c.low[t]; j < c.high[t]; ++j) total += grad[i * c.pool + j] * r.inverse[i] * c.inverse[j];
      segments[s * c.segments + t] = total * weight;
    }
}

// As above for V channels at once; `bins` of channel l start at bins + l * pool^2.
inline void to_bins(const vf* segments, const Axis& r, const Axis& c, bool average, vf weight, int64_t n, float* bins) {
  const int64_t count = r.pool * c.pool;
  for (int64_t i = 0; i < r.pool; ++i)
    for (int64_t j = 0; j < c.pool; ++j) {
      vf total = {};
      for (int64_t s = r.first[i]; s < r.last[i]; ++s)
        for (int64_t t = c.first[j]; t < c.last[j]; ++t) total += segments[s * c.segments + t];
      total *= average ? splat(r.inverse[i] * c.inverse[j]) : weight;
      float lanes[V];
      store(lanes, total);
      for (int64_t l = 0; l < n; ++l) bins[l * count + i * c.pool + j] = lanes[l];
    }
}

inline void from_bins(const float* grad, const Axis& r, const Axis& c, vf weight, int64_t n, vf* segments) {
  const int64_t count = r.pool * c.pool;
  for (int64_t s = 0; s < r.segments; ++s)
    for (int64_t t = 0; t < c.segments; ++t) {
      vf total = {};
      for (int64_t i = r.low[s]; i < r.high[s]; ++i)
        for (int64_t j = c.low[t]; j < c.high[t]; ++j) {
          float lanes[V] = {};
          for (int64_t l = 0; l < n; ++l) lanes[l] = grad[l * count + i * c.pool + j];
          total += load(lanes) * (r.inverse[i] * c.inverse[j]);
        }
      segments[s * c.segments + t] = total * weight;
    }
}

// NCHW -> NHWC, V x V blocks at a time, turned in registers.
inline int to_channels_last(const Activation& a, void* out, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = a.channels, area = a.height * a.width, blocks = (area + V - 1) / V;
    parallel(a.batch * blocks, elements(a), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, p = i % blocks * V, m = smaller(V, area - p);
        const T* from = static_cast<const T*>(a.data) + b * channels * area + p;
        T* to = static_cast<T*>(out) + (b * area + p) * channels;
        for (int64_t c = 0; c < channels; c += V) {
          const int64_t n = smaller(V, channels - c);
          vf row[V];
          for (int64_t l = 0; l < V; ++l) row[l] = l < n ? load_some(from + (c + l) * area, m) : vf{};
          transpose(row);
          for (int64_t q = 0; q < m; ++q) store_some(to + q * channels + c, row[q], n);
        }
      }
    });
    return 0;
  });
}

// -- latents, and normalise-activate-pool ----------------------------------------------------------------------

template <class T>
struct Pooling {
  const Activation& a;
  const Axis &rows, &columns;
  const Norm* norm;  // null: pool z itself and write no `out`
  bool max_pool;
  T* out;
  bool out_channels_last;
  float *latents, *s1, *s2;  // s1, s2 null: not wanted

  int64_t segments() const { return rows.segments * columns.segments; }
  int64_t bins() const { return rows.pool * columns.pool; }
};

template <class T, bool kNorm, bool kSums>
inline void pool_plane(const Pooling<T>& p, int64_t plane, const RowLanes& lanes, float* scratch) {
  const int64_t height = p.a.height, width = p.a.width, area = height * width, channel = plane % p.a.channels;
  const T* z = static_cast<const T*>(p.a.data) + plane * area;
  const Unit unit = kNorm ? unit_of_channel(*p.norm, channel) : Unit{};
  const int64_t count = p.segments(), sums_count = p.rows.segments, padded = lanes.padded();
  vf* totals = reinterpret_cast<vf*>(scratch);
  float* sums = scratch + p.columns.segments * V;  // of z or a, of lambda, of lambda * d; by row segment and lane
  float* segments = sums + 3 * sums_count * padded;
  float* activated = segments + 3 * count;  // the whole plane, before a max-pool
  constexpr int kSide = 32 / V;             // vectors side by side where nothing but a sum is wanted
  for (int64_t s = 0; s < p.rows.segments; ++s) {
    const int64_t begin = p.rows.bound[s] / lanes.rows, end = p.rows.bound[s + 1] / lanes.rows;
    int64_t w = 0;
    if (!kNorm)  // memory is taken in its order
      for (; w + kSide * V <= lanes.width; w += kSide * V) {
        vf total[kSide] = {};
        for (int64_t h = begin; h < end; ++h)
          for (int i = 0; i < kSide; ++i) total[i] += load(z + h * lanes.width + w + i * V);
        for (int i = 0; i < kSide; ++i) store(sums + s * padded + w + i * V, total[i]);
      }
    for (; w < lanes.width; w += V) {
      const int64_t n = smaller(V, lanes.width - w);
      vf total = {}, total1 = {}, total2 = {};
      for (int64_t h = begin; h < end; ++h) {
        const int64_t at = h * lanes.width + w;
        vf v = load_some(z + at, n);
        if (kNorm) {
          const vf d = unit.centred(v), u = unit.affine(d), lambda = unit.lambda(u);
          v = u * lambda;
          if (p.max_pool)
            store_some(activated + at, v, n);
          else
            store_some(p.out + plane * area + at, v, n);
          if (kSums) total1 += lambda, total2 += lambda * d;
        }
        total += v;
      }
      store(sums + s * padded + w, total);
      if (kSums) {
        store(sums + (sums_count + s) * padded + w, total1);
        store(sums + (2 * sums_count + s) * padded + w, total2);
      }
    }
  }
  add_lanes(sums, (kSums ? 3 : 1) * sums_count, lanes, p.columns, segments, totals);
  const int64_t bins = p.bins();
  to_bins(segments, p.rows, p.columns, true, 1, p.latents + plane * bins);
  if (kSums) {
    to_bins(segments + count, p.rows, p.columns, false, 1, p.s1 + plane * bins);
    to_bins(segments + 2 * count, p.rows, p.columns, false, p.norm->rstd[channel], p.s2 + plane * bins);
  }
  if (kNorm && p.max_pool) {
    const int64_t out_width = width / 2, out_height = height / 2;
    T* out = p.out + plane * out_height * out_width;
    for (int64_t h = 0; h < out_height; ++h)
      max_pool_rows(activated + 2 * h * width, activated + (2 * h + 1) * width, out_width, out + h * out_width);
  }
}

// (positions, V) -> n planes `area` apart, at positions [at, at + count): V x V blocks are turned in registers.
template <class T>
inline void store_planes(const float* buffer, int64_t count, int64_t n, T* out, int64_t area, int64_t at) {
  for (int64_t p = 0; p < count; p += V) {
    const int64_t m = smaller(V, count - p);
    vf row[V];
    for (int i = 0; i < V; ++i) row[i] = i < m ? load(buffer + (p + i) * V) : vf{};
    transpose(row);
    for (int64_t l = 0; l < n; ++l) store_some(out + l * area + at + p, row[l], m);
  }
}

// Takes rows of V channels, position-major, max-pools them where asked, and writes `out` in either format.
template <class T>
struct RowWriter {
  const Pooling<T>& p;
  int64_t n, width, area;  // channels; of `out`
  T* out;
  float *rows, *held;  // two rows of `a`; positions not yet written, fewer than V between calls
  int64_t holding = 0, written = 0;

  static int64_t scratch(int64_t width) { return (3 * width + V) * V; }

  RowWriter(const Pooling<T>& pooling, int64_t b, int64_t c, float* memory)
      : p(pooling),
        n(smaller(V, p.a.channels - c)),
        width(p.max_pool ? p.a.width / 2 : p.a.width),
        area(width * (p.max_pool ? p.a.height / 2 : p.a.height)),
        out(p.out + (p.out_channels_last ? b * area * p.a.channels + c : (b * p.a.channels + c) * area)),
        rows(memory),
        held(memory + 2 * p.a.width * V) {}

  // where row h of `a` is to be put
  float* row(int64_t h) { return p.max_pool ? rows + h % 2 * p.a.width * V : held + holding * V; }

  void finish_row(int64_t h) {
    if (p.max_pool) {
      if (h % 2 == 0) return;
      const float *top = rows, *bottom = rows + p.a.width * V;
      for (int64_t w = 0; w < width; ++w, top += 2 * V, bottom += 2 * V)
        store(held + (holding + w) * V, wins(load(bottom + V), wins(load(bottom), wins(load(top + V), load(top)))));
    }
    if (p.out_channels_last) {
      for (int64_t w = 0; w < width; ++w) store_some(out + (written + w) * p.a.channels, load(held + w * V), n);
      written += width;
      return;
    }
    holding += width;
    const int64_t ready = written + holding == area ? holding : holding / V * V;
    store_planes(held, ready, n, out, area, written);
    std::memmove(held, held + ready * V, (holding - ready) * V * sizeof(float));
    written += ready;
    holding -= ready;
  }
};

template <class T, bool kNorm, bool kSums>
inline void pool_channels(const Pooling<T>& p, int64_t b, int64_t c, float* scratch) {
  const int64_t height = p.a.height, width = p.a.width, channels = p.a.channels, n = smaller(V, channels - c);
  const T* z = static_cast<const T*>(p.a.data) + b * height * width * channels + c;
  const Unit unit = kNorm ? unit_of_channels(*p.norm, c, n) : Unit{};
  const bool direct = p.out_channels_last && !p.max_pool;
  const int64_t count = p.segments();
  vf* segments = reinterpret_cast<vf*>(scratch);
  RowWriter<T> writer(p, b, c, scratch + 3 * count * V);
  for (int64_t i = 0; i < (kSums ? 3 : 1) * count; ++i) segments[i] = vf{};
  int64_t s = 0;
  for (int64_t h = 0; h < height; ++h) {
    if (h == p.rows.bound[s + 1]) ++s;
    float* row = writer.row(h);
    for (int64_t t = 0; t < p.columns.segments; ++t) {
      vf total = {}, total1 = {}, total2 = {};
      for (int64_t w = p.columns.bound[t]; w < p.columns.bound[t + 1]; ++w) {
        const int64_t at = (h * width + w) * channels;
        vf v = load_some(z + at, n);
        if (kNorm) {
          const vf d = unit.centred(v), u = unit.affine(d), lambda = unit.lambda(u);
          v = u * lambda;
          if (direct)
            store_some(p.out + b * height * width * channels + c + at, v, n);
          else
            store(row + w * V, v);
          if (kSums) total1 += lambda, total2 += lambda * d;
        }
        total += v;
      }
      vf* to = segments + s * p.columns.segments + t;
      to[0] += total;
      if (kSums) to[count] += total1, to[2 * count] += total2;
    }
    if (kNorm && !direct) writer.finish_row(h);
  }
  const int64_t bins = p.bins(), at = (b * channels + c) * bins;
  to_bins(segments, p.rows, p.columns, true, vf{}, n, p.latents + at);
  if (kSums) {
    to_bins(segments + count, p.rows, p.columns, false, splat(1), n, p.s1 + at);
    to_bins(segments + 2 * count, p.rows, p.columns, false, load_some(p.norm->rstd + c, n), n, p.s2 + at);
  }
}

template <bool kNorm, bool kSums, class T>
inline int pool(const Pooling<T>& p, int threads) {
  const int64_t height = p.a.height, width = p.a.width, groups = (p.a.channels + V - 1) / V;
  const int64_t size = p.a.channels_last ? 3 * p.segments() * V + RowWriter<T>::scratch(width)
                                         : p.columns.segments * V + 3 * p.rows.segments * (width + V) +
                                               3 * p.segments() + (p.max_pool ? height * width : 0);
  Scratch scratch(size, threads), map(RowLanes::scratch(p.columns), 1);
  if (!scratch || !map) return 1;
  const RowLanes lanes(p.rows, p.columns, map.of(0));
  const int64_t items = p.a.batch * (p.a.channels_last ? groups : p.a.channels);
  parallel(items, elements(p.a), threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      if (p.a.channels_last)
        pool_channels<T, kNorm, kSums>(p, i / groups, i % groups * V, scratch.of(thread));
      else
        pool_plane<T, kNorm, kSums>(p, i, lanes, scratch.of(thread));
  });
  return 0;
}

inline int latents(const Activation& a, const Axis& rows, const Axis& columns, float* out, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return pool<false, false>(
        Pooling<T>{a, rows, columns, nullptr, false, nullptr, a.channels_last, out, nullptr, nullptr}, threads);
  });
}

inline int norm_act_pool(const Activation& a, const Axis& rows, const Axis& columns, const Norm& norm, bool max_pool,
                         void* out, bool out_channels_last, float* latents, float* s1, float* s2, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Pooling<T> p{a, rows, columns, &norm, max_pool, static_cast<T*>(out), out_channels_last, latents, s1, s2};
    return s1 ? pool<true, true>(p, threads) : pool<true, false>(p, threads);
  });
}

}  // namespace lgk::cpu::LGK_ISA
