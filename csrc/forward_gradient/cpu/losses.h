// The passes of the replicated losses over x (samples, patches, groups, channels) and its tangent.
#pragma once
#include "common/cpu/cross_entropy.h"
#include "forward_gradient/cpu/norm.h"

namespace lgk::cpu::LGK_ISA {

constexpr float kEps = 1e-5f;          // of the layer norm in front of a loss
constexpr int64_t kPatches = 64;       // whose sum is one piece of work
constexpr int64_t kColumns = 512;      // channels of such a piece
constexpr int64_t kNormalized = 2048;  // the same with a norm in front
constexpr int64_t kRead = 4096;        // elements that are read together
constexpr int64_t kAhead = 1024;       // floats between what is read and what is asked for

inline int64_t elements(const FeatureShape& s) { return s.samples * s.patches * s.groups * s.channels; }

// acc (count) = the sum over `patches` rows of x, `stride` apart; pairs of pairs of rows, so that sums stay short
template <class T>
inline void add_patches(const T* x, int64_t patches, int64_t stride, int64_t count, float* acc) {
  column_sums<1>(
      patches, count,
      [&](int64_t p, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        const T* from = x + p * stride + j;
        if (j % (64 / sizeof(T)) == 0) ask_for(from, 1, kRowsAdded * stride);
        t[0] = load_some(from, n);
      },
      &acc);
}

// acc (groups, channels) += LN of each of the `rows` rows of x, whose groups follow one another
inline void add_normalized(const float* x, int64_t rows, int64_t groups, int64_t channels, float* acc) {
  int64_t group = 0;
  for (int64_t i = 0; i < rows; i += V) {
    const int64_t count = smaller(V, rows - i);
    const float* some = x + i * channels;
    ask_for(some, count * channels, kAhead);
    LaneMoments m;
    row_moments<false>(some, nullptr, count, channels, kEps, &m);
    for (int64_t r = 0; r < count; ++r, group = group + 1 == groups ? 0 : group + 1)
      for_vectors(channels, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
        float* to = acc + group * channels + j;
        store_some(to, load_some(to, n) + (load_some(some + r * channels + j, n) - m.mean[r]) * m.r[r], n);
      });
  }
}

// A run of patches of one sample, columns [begin, begin + count).
inline int sum_patches(const FeatureShape& s, const Array& x, bool layer_norm, int64_t patch, int64_t patches,
                       int64_t begin, int64_t count, float* buffer, float* acc) {
  const int64_t width = s.groups * s.channels;  // `patch` counts those of all samples
  if (!layer_norm)
    return for_dtype(x.dtype, [&](auto type) {
      add_patches(static_cast<const decltype(type)*>(x.data) + patch * width + begin, patches, width, count, acc);
      return 0;
    });
  for (int64_t j = 0; j < count; ++j) acc[j] = 0;
  const int64_t at_once = count == width ? rows_at_once(width, kRead) : 1, groups = count / s.channels;
  for (int64_t p = 0; p < patches; p += at_once) {
    const int64_t some = smaller(at_once, patches - p);
    add_normalized(widened(x, (patch + p) * width + begin, some * count, buffer), some * groups, groups, s.channels,
                   acc);
  }
  return 0;
}

inline int pooled(const FeatureShape& s, const Array& x, bool layer_norm, float* out, int threads) {
  const int64_t width = s.groups * s.channels, runs = (s.patches + kPatches - 1) / kPatches;
  const int64_t most = layer_norm ? kNormalized : kColumns, unit = layer_norm ? s.channels : 1;
  const int64_t block = (unit > most ? 1 : most / unit) * unit;
  const int64_t blocks = (width + block - 1) / block;
  Scratch sums(runs > 1 ? s.samples * runs * width : 0, 1), own(2 * block + kRead + 4 * V, threads);
  if (!sums || !own) return 1;
  const float share = 1 / static_cast<float>(s.patches);
  parallel(s.samples * runs * blocks, elements(s), threads, [&](int64_t first_piece, int64_t end, int thread) {
    float *acc = own.of(thread), *buffer = acc + block + V;
    for (int64_t i = first_piece; i < end; ++i) {
      const int64_t run = i / blocks, begin = i % blocks * block, count = smaller(block, width - begin);
      const int64_t sample = run / runs, patch = run % runs * kPatches;
      sum_patches(s, x, layer_norm, sample * s.patches + patch, smaller(kPatches, s.patches - patch), begin, count,
                  buffer, acc);
      float* to = (runs > 1 ? sums.of(0) + run * width : out + sample * width) + begin;
      for (int64_t j = 0; j < count; ++j) to[j] = runs > 1 ? acc[j] : acc[j] * share;
    }
  });
  if (runs == 1) return 0;
  parallel(s.samples, s.samples * runs * width, threads, [&](int64_t first_sample, int64_t end, int) {
    for (int64_t i = first_sample; i < end; ++i)
      for (int64_t begin = 0; begin < width; begin += kColumns) {
        float *total = out + i * width + begin, acc[kColumns];
        const int64_t count = smaller(kColumns, width - begin);
        add_patches(sums.of(0) + i * runs * width + begin, runs, width, count, acc);
        for (int64_t j = 0; j < count; ++j) total[j] = acc[j] * share;
      }
  });
  return 0;
}

inline int softmax(const float* logits, const int64_t* target, int64_t rows, int64_t classes, float* delta, float* loss,
                   int threads) {
  parallel(rows, rows * classes * 8, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * classes;
      loss[i] = static_cast<float>(cross_entropy(classes, 0, logits + at, target[i], delta + at));
    }
  });
  return 0;
}

// out = teach (groups, channels) less the mean of each group
inline void centre(const float* teach, int64_t groups, int64_t channels, float* out) {
  for (int64_t g = 0; g < groups; ++g, teach += channels, out += channels) {
    vf lanes;
    lane_sums<1>(
        channels, [&](int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA { t[0] = load_some(teach + j, n); }, &lanes);
    const float mean = sum(lanes) / static_cast<float>(channels);
    for (int64_t j = 0; j < channels; ++j) out[j] = teach[j] - mean;
  }
}

// visit(sample, first row, rows, teach of its groups, thread) over stretches of (patch, group) rows of one sample. The
// teach is centred where LN is in front: LN' is its own transpose and takes no mean.
template <class Visit>
inline int for_stretches(const FeatureShape& s, const float* teach, bool layer_norm, int threads, const Visit& visit) {
  const int64_t rows = s.patches * s.groups, width = s.groups * s.channels, size = rows_at_once(s.channels, kRead);
  const int64_t stretches = (rows + size - 1) / size;
  Scratch centred(layer_norm ? width : 0, threads);
  if (!centred) return 1;
  parallel(s.samples * stretches, elements(s), threads, [&](int64_t begin, int64_t end, int thread) {
    int64_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / stretches, row = i % stretches * size;
      const float* own = teach + sample * width;
      if (layer_norm) {
        if (sample != last) centre(own, s.groups, s.channels, centred.of(thread));
        own = centred.of(thread), last = sample;
      }
      visit(sample, row, smaller(size, rows - row), own, thread);
    }
    stream_fence();
  });
  return 0;
}

// Rows of teach for V rows from `row` on.
struct TeachRows {
  const float* of[V];
  TeachRows(const float* teach, int64_t row, int64_t groups, int64_t channels) {
    int64_t g = row % groups;
    for (int i = 0; i < V; ++i, g = g + 1 == groups ? 0 : g + 1) of[i] = teach + g * channels;
  }
};

template <int N>
struct PackedRow {  // of V / N rows in each of N vectors, the lane that `sum_of_lanes` leaves for a row
  static constexpr int lane(int row) { return row % (V / N) * N + row / (V / N); }
};

// (V) <v, teach> of V rows of N < V channels, V / N in a vector, the first of group g: `plain_tangents` to the bit
template <int N>
inline vf packed_tangents(const float* v, const float* teach, int64_t g, int64_t groups) {
  vf t[N];
  for (int q = 0; q < N; ++q) {
    t[q] = load(v + q * V) * load(teach + g * N);
    if ((g += V / N) == groups) g = 0;
  }
  const vf sums = sum_of_lanes<N>(t);
  return shuffle<PackedRow<N>>(sums, sums);
}

// packed_tangents of this number of channels, where no vector's rows go beyond the last group
inline auto packed_by(int64_t channels, int64_t groups) {
  using Packed = vf (*)(const float*, const float*, int64_t, int64_t);
  if (channels >= V || V % channels || groups % (V / channels)) return Packed{};
  if (channels == 8) return Packed{packed_tangents<(V > 8 ? 8 : 1)>};
  if (channels == 4) return Packed{packed_tangents<(V > 4 ? 4 : 1)>};
  return channels == 2 ? Packed{packed_tangents<2>} : Packed{packed_tangents<1>};
}

// (V) <v, teach> of each row; with x, <LN'(x; v), teach>
inline vf plain_tangents(const float* v, const TeachRows& teach, int64_t rows, int64_t channels) {
  vf total;
  row_sums<1>(
      rows, channels,
      [&](int64_t i, int64_t j, int64_t n, vf* t)
          LGK_INLINE_LAMBDA { t[0] = load_some(v + i * channels + j, n) * load_some(teach.of[i] + j, n); },
      &total);
  return total;
}

inline vf norm_tangents(const float* x, const float* v, const TeachRows& teach, int64_t rows, int64_t channels) {
  vf total, sums[4];
  alignas(64) float mean[V];
  const float size = static_cast<float>(channels);
  row_sums<1>(
      rows, channels,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA { t[0] = load_some(x + i * channels + j, n); },
      &total);
  store(mean, total / size);
  row_sums<4>(
      rows, channels,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        const vf d = load_some(x + i * channels + j, n) - mean[i], s = load_some(teach.of[i] + j, n);
        const vf w = load_some(v + i * channels + j, n);
        t[0] = d * d;
        t[1] = s * w;
        t[2] = d * w;
        t[3] = d * s;
      },
      sums);
  const vf r = 1.f / square_root(sums[0] / size + kEps);
  return r * (sums[1] - sums[2] * r * (sums[3] * r / size));
}

inline int tangent(const FeatureShape& s, const Array& x, const Array& x_tangent, const float* teach, const float* head,
                   float* out, int threads) {
  const int64_t rows = s.patches * s.groups, c = s.channels, room = rows_at_once(c, kRead) * c + 2 * V;
  const float share = 1 / static_cast<float>(s.patches);
  const auto packed = packed_by(c, s.groups);
  Scratch own(2 * room, threads);
  if (!own) return 1;
  return for_stretches(s, teach, x.data, threads,
                       [&](int64_t sample, int64_t row, int64_t count, const float* teach_of_sample, int thread) {
                         const int64_t start = sample * rows + row;
                         const float* v = widened(x_tangent, start * c, count * c, own.of(thread));
                         const float* z = x.data ? widened(x, start * c, count * c, own.of(thread) + room) : nullptr;
                         const float added = head ? head[sample] : 0.f;
                         for (int64_t i = 0; i < count; i += V) {
                           const int64_t some = smaller(V, count - i);
                           ask_for(v + i * c, some * c, kAhead);
                           if (z) ask_for(z + i * c, some * c, kAhead);
                           vf dots;
                           if (packed && !z && some == V) {
                             dots = packed(v + i * c, teach_of_sample, (row + i) % s.groups, s.groups);
                           } else {
                             const TeachRows t(teach_of_sample, row + i, s.groups, c);
                             dots = z ? norm_tangents(z + i * c, v + i * c, t, some, c)
                                      : plain_tangents(v + i * c, t, some, c);
                           }
                           store_some(out + start + i, dots * share + added, some);
                         }
                       });
}

// Moments of rows of x, with `along` of their teach.
inline void teach_moments(const float* x, const TeachRows& teach, int64_t rows, int64_t channels, LaneMoments* m) {
  const float size = static_cast<float>(channels);
  vf total, sums[2];
  row_sums<1>(
      rows, channels,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA { t[0] = load_some(x + i * channels + j, n); },
      &total);
  store(m->mean, total / size);
  row_sums<2>(
      rows, channels,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        const vf d = load_some(x + i * channels + j, n) - m->mean[i];
        t[0] = d * d;
        t[1] = d * load_some(teach.of[i] + j, n);
      },
      sums);
  const vf r = 1.f / square_root(sums[0] / size + kEps);
  store(m->r, r);
  store(m->along, sums[1] / size * r * r);
}

inline int cotangent(const FeatureShape& s, const Array& x, const float* grad, const float* teach, const Array& out,
                     int threads) {
  const int64_t rows = s.patches * s.groups, c = s.channels, size = rows_at_once(c, kRead) * c + 2 * V;
  const float share = 1 / static_cast<float>(s.patches);
  const bool streamed = streams(out.data, out.dtype, c, elements(s));
  Scratch own(2 * size, threads);
  if (!own) return 1;
  return for_stretches(s, teach, x.data, threads,
                       [&](int64_t sample, int64_t row, int64_t count, const float* teach_of_sample, int thread) {
                         const int64_t start = sample * rows + row;
                         const float* z = x.data ? widened(x, start * c, count * c, own.of(thread)) : nullptr;
                         float* to = room(out.data, out.dtype, start * c, own.of(thread) + size);
                         for (int64_t i = 0; i < count; i += V) {
                           const int64_t some = smaller(V, count - i);
                           const TeachRows t(teach_of_sample, row + i, s.groups, c);
                           LaneMoments m;
                           if (z) ask_for(z + i * c, some * c, kAhead);
                           if (z) teach_moments(z + i * c, t, some, c, &m);
                           for (int64_t k = 0; k < some; ++k) {
                             const float scale = grad[start + i + k] * share;
                             const int64_t start_of_row = (i + k) * c;
                             if (!z)
                               for_vectors(c, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
                                 put(to + start_of_row + j, load_some(t.of[k] + j, n) * scale, n, streamed);
                               });
                             else
                               for_vectors(c, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
                                 const vf d = load_some(z + start_of_row + j, n) - m.mean[k];
                                 put(to + start_of_row + j,
                                     (load_some(t.of[k] + j, n) - d * m.along[k]) * (m.r[k] * scale), n, streamed);
                               });
                           }
                         }
                         narrowed(to, out.data, out.dtype, start * c, count * c);
                       });
}

}  // namespace lgk::cpu::LGK_ISA
