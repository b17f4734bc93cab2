// What the LLS kernels share: the bins of adaptive pooling and the normalisation of one element.
#pragma once
#include "common/cuda/device.h"
#include "lls/cuda/kernels.h"

namespace lgk::cuda {

constexpr int kThreads = 256;
constexpr int kLoads = 4;              // 16-byte loads of a thread in flight
constexpr int kMaxShared = 48 * 1024;  // bytes that a block gets without asking

// Bin i of P covers [floor(i n / P), ceil((i + 1) n / P)). Bins may overlap (n % P != 0) or repeat (P > n); a position
// is owned by the last bin that covers it, as in the Triton kernels, so that one block alone writes it.
struct Span {
  int begin, end, owned;  // [begin, end) is covered, [begin, owned) is owned
  LGK_DEVICE bool owns(int position) const { return position >= begin && position < owned; }
};

LGK_DEVICE int span_begin(int bin, int size, int pool) { return bin * size / pool; }
LGK_DEVICE int span_end(int bin, int size, int pool) { return ((bin + 1) * size + pool - 1) / pool; }
LGK_DEVICE int span_size(int bin, int size, int pool) {
  return span_end(bin, size, pool) - span_begin(bin, size, pool);
}
LGK_DEVICE Span span(int bin, int size, int pool) {
  return Span{span_begin(bin, size, pool), span_end(bin, size, pool), span_begin(bin + 1, size, pool)};
}

// The bins that cover a position: first to last.
LGK_DEVICE int first_bin(int position, int size, int pool) { return position * pool / size; }
LGK_DEVICE int last_bin(int position, int size, int pool) { return ((position + 1) * pool - 1) / size; }

// Adjoint of the pooling at (h, w): the sum over the bins that cover it of grad / area; `grad` holds a plane's bins.
// `even`: each position lies in exactly one bin.
LGK_DEVICE float unpool(const Image& s, bool even, const float* grad, int h, int w) {
  if (even) {
    const int rows = s.height / s.pool_rows, columns = s.width / s.pool_columns;
    return grad[h / rows * s.pool_columns + w / columns] / static_cast<float>(rows * columns);
  }
  const int last_i = last_bin(h, s.height, s.pool_rows), last_j = last_bin(w, s.width, s.pool_columns);
  float sum = 0.0f;
  for (int i = first_bin(h, s.height, s.pool_rows); i <= last_i; ++i)
    for (int j = first_bin(w, s.width, s.pool_columns); j <= last_j; ++j)
      sum += grad[i * s.pool_columns + j] /
             static_cast<float>(span_size(i, s.height, s.pool_rows) * span_size(j, s.width, s.pool_columns));
  return sum;
}

// One channel's normalisation: u = gain * (z - mean) + beta with gain = gamma * rstd.
struct Channel {
  float mean, gain, beta;
};

LGK_DEVICE Channel channel(const Norm& norm, int c) {
  return norm.mean == nullptr ? Channel{0.0f, 1.0f, 0.0f}
                              : Channel{norm.mean[c], norm.gamma[c] * norm.rstd[c], norm.beta[c]};
}

LGK_DEVICE float rstd(const Norm& norm, int c) { return norm.rstd == nullptr ? 1.0f : norm.rstd[c]; }

// Forward and backward must agree on the sign of u, so its rounding is spelled out.
LGK_DEVICE float preactivation(const Channel& p, float centred) { return fmaf(centred, p.gain, p.beta); }

// Lanes side by side in a row of an NCHW tensor; a warp takes 32 / lanes rows at a time.
inline int row_lanes(const Image& s, int vector) { return power_of_two_from(ceil_div(s.width, vector), 32); }

inline bool divides_evenly(const Image& s) { return s.height % s.pool_rows == 0 && s.width % s.pool_columns == 0; }

// Offsets inside a sample and products of a size and a bin count are 32-bit; a batch may be of any size.
inline bool fits(const Image& s) {
  const int64_t limit = int64_t{1} << 31, height = s.height + int64_t{1}, width = s.width + int64_t{1};
  return height * width * s.channels < limit && height * (s.pool_rows + int64_t{1}) < limit &&
         width * (s.pool_columns + int64_t{1}) < limit && int64_t{s.channels} * s.pool_rows * s.pool_columns < limit;
}

// Every 16-byte vector of a row lies in exactly one bin.
inline bool bins_are_whole_vectors(const Image& s, int vector) {
  return s.width % s.pool_columns == 0 && s.width / s.pool_columns % vector == 0;
}

}  // namespace lgk::cuda
