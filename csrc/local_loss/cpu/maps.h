// Passes over a feature map: mean and variance of each channel of each sample, and the gradient built from them.
// Planes run V at a time with lanes along the positions; channels-last runs with lanes along the channels.
// Every sum has an order that no number of threads changes.
#pragma once
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "local_loss/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kPooled = 512;   // channels of a channels-last map that are summed side by side
constexpr int64_t kRun = 64;       // positions added up before they join the total: short sums lose less
constexpr int64_t kPiece = 16384;  // elements of a piece of work

inline int64_t elements(const FeatureMap& x) { return x.batch * x.channels * x.positions; }

template <class T>
inline const T* sample(const FeatureMap& x, int64_t b) {
  return static_cast<const T*>(x.data) + b * x.batch_stride;
}

// Lanes of the sum over a dense run of x - mean, or of its square.
template <bool SQUARE, class T>
inline vf run_sum(const T* x, int64_t size, float mean) {
  vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * V <= size; i += 4 * V)
    for (int k = 0; k < 4; ++k) {
      const vf v = load(x + i + k * V) - mean;
      total[k] += SQUARE ? v * v : v;
    }
  for (int k = 0; i + V <= size; i += V, ++k) {
    const vf v = load(x + i) - mean;
    total[k] += SQUARE ? v * v : v;
  }
  if (i < size) {
    const vf v = first(load(x + i, size - i) - mean, size - i);
    total[3] += SQUARE ? v * v : v;
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// out[j] = the sum over V planes' lanes, turned so that lanes are added as vectors
template <bool SQUARE, class T>
inline void plane_sums(const T* x, int64_t positions, int64_t count, const float* mean, float factor, float* out) {
  vf row[V];
  for (int64_t j = 0; j < V; ++j)
    row[j] = j < count ? run_sum<SQUARE>(x + j * positions, positions, mean ? mean[j] : 0.f) : vf{};
  transpose(row);
  for (int width = V / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) row[j] += row[j + width];
  store_some(out, row[0] * factor, count);
}

// Sums over the positions, or with SQUARE of x - shift and of its square: one row of channels after the other, as
// memory goes.
struct Columns {
  alignas(64) float shift[kPooled] = {}, sum[kPooled] = {}, square[kPooled] = {}, run[kPooled], square_run[kPooled];

  template <int N, bool SQUARE, class T>
  LGK_INLINE void add_row(const T* x, int64_t c, int64_t tail) {
    for (int k = 0; k < N; ++k, c += V) {
      vf v = tail == V ? load(x + c) : load(x + c, tail);
      if (SQUARE) {
        v -= load(shift + c);
        store(square_run + c, load(square_run + c) + v * v);
      }
      store(run + c, load(run + c) + v);
    }
  }

  template <bool SQUARE, class T>
  void add(const T* x, int64_t positions, int64_t stride, int64_t channels) {
    for (int64_t begin = 0; begin < positions; begin += kRun) {
      for (int64_t c = 0; c < channels; c += V) store(run + c, vf{}), store(square_run + c, vf{});
      for (int64_t p = begin; p < smaller(positions, begin + kRun); ++p) {
        int64_t c = 0;
        for (; c + 4 * V <= channels; c += 4 * V) add_row<4, SQUARE>(x + p * stride, c, V);
        for (; c < channels; c += V) add_row<1, SQUARE>(x + p * stride, c, smaller(V, channels - c));
      }
      for (int64_t c = 0; c < channels; c += V) {
        store(sum + c, load(sum + c) + load(run + c));
        if (SQUARE) store(square + c, load(square + c) + load(square_run + c));
      }
    }
  }
};

// As `plane_sums`, for up to kPooled channels. The squares are taken about the mean of the first positions.
template <class T>
inline void column_moments(const T* x, int64_t positions, int64_t stride, int64_t channels, float* mean, float* var) {
  Columns columns;
  const float share = 1 / static_cast<float>(positions), unbiased = 1 / static_cast<float>(positions - 1);
  if (!var) {
    columns.add<false>(x, positions, stride, channels);
  } else {
    const int64_t probe = smaller(kRun, positions);
    columns.add<false>(x, probe, stride, channels);
    for (int64_t c = 0; c < channels; ++c) {
      columns.shift[c] = columns.sum[c] / static_cast<float>(probe);
      columns.sum[c] = 0;
    }
    columns.add<true>(x, positions, stride, channels);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float offset = columns.sum[c] * share, spread = columns.square[c] - offset * columns.sum[c];
    mean[c] = columns.shift[c] + offset;
    if (var) var[c] = (spread < 0 ? 0 : spread) * unbiased;
  }
}

inline int moments(const FeatureMap& x, float* mean, float* var, int threads) {
  const float share = 1 / static_cast<float>(x.positions), unbiased = 1 / static_cast<float>(x.positions - 1);
  const int64_t block = x.channels_last ? kPooled : V, blocks = (x.channels + block - 1) / block;
  return for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(x.batch * blocks, elements(x), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, c = i % blocks * block, count = smaller(block, x.channels - c);
        float *m = mean + b * x.channels + c, *v = var ? var + b * x.channels + c : nullptr;
        if (x.channels_last) {
          column_moments(sample<T>(x, b) + c, x.positions, x.channels, count, m, v);
        } else {
          const T* plane = sample<T>(x, b) + c * x.positions;
          plane_sums<false>(plane, x.positions, count, nullptr, share, m);
          if (v) plane_sums<true>(plane, x.positions, count, m, unbiased, v);
        }
      }
    });
    return 0;
  });
}

inline int scale_shifted(const FeatureMap& x, const float* shift, const float* scale, void* out, int threads) {
  return for_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    // rows of one factor (a plane), or of one for each element (a position's channels), in pieces
    const int64_t rows = x.channels_last ? x.positions : x.channels, size = x.channels_last ? x.channels : x.positions;
    const int64_t pieces = x.channels_last ? 1 : (size + kPiece - 1) / kPiece;
    parallel(x.batch * rows * pieces, elements(x), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / pieces, b = row / rows, r = row % rows;
        const T* from = sample<T>(x, b) + r * size;
        T* to = static_cast<T*>(out) + row * size;
        const int64_t factor = b * x.channels + (x.channels_last ? 0 : r);
        const int64_t low = i % pieces * kPiece, high = x.channels_last ? size : smaller(size, low + kPiece);
        for (int64_t j = low; j < high; j += V) {
          const int64_t n = smaller(V, high - j);
          const vf by = x.channels_last ? load_some(scale + factor + j, n) : splat(scale[factor]);
          vf v = load_some(from + j, n);
          if (shift) v -= x.channels_last ? load_some(shift + factor + j, n) : splat(shift[factor]);
          store_some(to + j, v * by, n);
        }
      }
    });
    return 0;
  });
}

}  // namespace lgk::cpu::LGK_ISA
