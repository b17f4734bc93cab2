// LLS block: normalise, activate, max-pool and pool the latents in one pass; the gradient in place of z in another.
//
//   xhat = (z - mean) rstd,  u = gamma xhat + beta,  a = u > 0 ? u : slope u,  lambda = u > 0 ? 1 : slope
//   latents = mean of a over each bin,  s1 = sum of lambda,  s2 = sum of lambda xhat
//   dz = gamma rstd scale (lambda unpool(grad_latents) - (dbeta + xhat dgamma) / N)
//
// Bin i of P covers [floor(i H / P), ceil((i + 1) H / P)). Bins may overlap (H % P != 0) or repeat (P > H); of the
// positions that bin i covers it owns, and writes to `out`, those that bin i - 1 does not cover.
//
// channels_last: one block per bin and tile of channels; a thread keeps 16 bytes of channels and walks over positions.
// NCHW: one warp per plane and row of bins; a thread keeps 16 bytes of columns and walks over rows.
#include "lgk/device.h"
#include "lgk/lls_cuda.h"

namespace lgk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 4;  // 16-byte loads of a thread in flight
constexpr int kMaxShared = 48 * 1024;

struct Span {
  int begin, end, own;  // [begin, end) is covered, [own, end) is owned
};

LGK_DEVICE int span_end(int bin, int size, int pool) {
  return static_cast<int>(((bin + int64_t{1}) * size + pool - 1) / pool);
}

LGK_DEVICE Span span(int bin, int size, int pool) {
  return Span{static_cast<int>(int64_t{bin} * size / pool), span_end(bin, size, pool),
              bin == 0 ? 0 : span_end(bin - 1, size, pool)};
}

struct Channel {
  float mean, rstd, gamma, beta;
};

LGK_DEVICE Channel channel(const Norm& norm, int c) {
  return norm.mean == nullptr ? Channel{0.0f, 1.0f, 1.0f, 0.0f}
                              : Channel{norm.mean[c], norm.rstd[c], norm.gamma[c], norm.beta[c]};
}

// Forward and backward must agree on the sign of u, so its rounding is spelled out.
LGK_DEVICE float normalized(const Channel& p, float z) { return (z - p.mean) * p.rstd; }
LGK_DEVICE float affine(const Channel& p, float xhat) { return fmaf(xhat, p.gamma, p.beta); }

// torch's max pooling: a nan wins.
LGK_DEVICE float larger(float best, float value) { return value > best || value != value ? value : best; }

struct BinSums {
  float a = 0.0f, s1 = 0.0f, s2 = 0.0f;
};

// Activation of one element; counts it into `sums` where it lies in the bin.
LGK_DEVICE float activate(const Channel& p, float slope, float z, bool in_bin, BinSums& sums) {
  const float xhat = normalized(p, z), u = affine(p, xhat);
  const float lambda = u > 0.0f ? 1.0f : slope, a = lambda * u;
  if (in_bin) {
    sums.a += a;
    sums.s1 += lambda;
    sums.s2 += lambda * xhat;
  }
  return a;
}

struct BinOutputs {
  float *latents, *s1, *s2;
};

// kind 0, 1, 2: the sum of a, lambda, lambda * xhat over a bin of `area` positions.
LGK_DEVICE void write_bin(const BinOutputs& out, int kind, int64_t index, float sum, int area) {
  if (kind == 0) out.latents[index] = sum / static_cast<float>(area);
  if (kind == 1 && out.s1 != nullptr) out.s1[index] = sum;
  if (kind == 2 && out.s2 != nullptr) out.s2[index] = sum;
}

// -- normalise, activate, pool ------------------------------------------------------------------------------------

// UNIT x UNIT positions make one position of `out` (2: max-pool). Block (channel vectors, positions).
template <typename T, int UNIT>
__global__ void __launch_bounds__(kThreads, 2)
norm_act_pool_nhwc(Image s, Norm norm, bool aligned, const T* __restrict__ z, T* __restrict__ out, BinOutputs bins) {
  constexpr int V = kVector<T>;
  LGK_DYNAMIC_SHARED(float, partial);  // (3, blockDim.y, V, blockDim.x)
  const int tile_channels = blockDim.x * V, tiles = ceil_div(s.channels, tile_channels);
  const int tile = blockIdx.x % tiles, cell = blockIdx.x / tiles;
  const int j = cell % s.pool_columns, i = cell / s.pool_columns % s.pool_rows;
  const int64_t b = cell / s.pool_columns / s.pool_rows;
  const Span rows = span(i, s.height, s.pool_rows), columns = span(j, s.width, s.pool_columns);
  const int c0 = (tile * blockDim.x + threadIdx.x) * V, channels = s.channels - c0;
  const int out_height = s.height / UNIT, out_width = s.width / UNIT;

  BinSums sums[V];
  if (channels > 0) {
    Channel p[V];
#pragma unroll
    for (int v = 0; v < V; ++v) p[v] = channel(norm, v < channels ? c0 + v : c0);
    // Units of UNIT x UNIT positions; with UNIT = 2 those at the edges may reach beyond the bin.
    const int unit_row = rows.begin / UNIT, unit_column = columns.begin / UNIT;
    const int unit_columns = (columns.end - 1) / UNIT + 1 - unit_column;
    const int units = ((rows.end - 1) / UNIT + 1 - unit_row) * unit_columns;
    constexpr int kUnits = UNIT == 1 ? kLoads : 1;
    for (int first = threadIdx.y; first < units; first += blockDim.y * kUnits) {
      Pack<T, V> pack[kLoads];
      int h[kLoads], w[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int unit = first + (UNIT == 1 ? q * static_cast<int>(blockDim.y) : 0);
        h[q] = (unit_row + unit / unit_columns) * UNIT + (UNIT == 1 ? 0 : q / 2);
        w[q] = (unit_column + unit % unit_columns) * UNIT + (UNIT == 1 ? 0 : q % 2);
        if (unit >= units || h[q] >= s.height || w[q] >= s.width) h[q] = -1;
        if (h[q] >= 0)
          pack[q] = load<T, V>(z + ((b * s.height + h[q]) * s.width + w[q]) * s.channels + c0, channels, aligned);
      }
      float best[V];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        if (h[q] < 0) continue;
        const bool in_bin = UNIT == 1 || (h[q] >= rows.begin && h[q] < rows.end && w[q] >= columns.begin &&
                                          w[q] < columns.end);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float a = activate(p[v], norm.slope, to_float(pack[q].element[v]), in_bin, sums[v]);
          best[v] = UNIT == 1 || q == 0 ? a : larger(best[v], a);
        }
        if (UNIT == 1 && out != nullptr && h[q] >= rows.own && w[q] >= columns.own)
          store<T, V>(out + ((b * s.height + h[q]) * s.width + w[q]) * s.channels + c0, best, channels, aligned);
      }
      if (UNIT == 2 && h[0] >= rows.own && w[0] >= columns.own && h[3] >= 0)
        store<T, V>(out + ((b * out_height + h[0] / 2) * out_width + w[0] / 2) * s.channels + c0, best, channels,
                    aligned);
    }
  }

#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float value[3] = {sums[v].a, sums[v].s1, sums[v].s2};
#pragma unroll
    for (int kind = 0; kind < 3; ++kind)
      partial[((kind * blockDim.y + threadIdx.y) * V + v) * blockDim.x + threadIdx.x] = value[kind];
  }
  __syncthreads();
  const int area = (rows.end - rows.begin) * (columns.end - columns.begin);
  for (int k = threadIdx.y * blockDim.x + threadIdx.x; k < 3 * tile_channels; k += blockDim.x * blockDim.y) {
    const int kind = k / tile_channels, slot = k % tile_channels;  // slot = v * blockDim.x + thread
    const int c = (tile * blockDim.x + slot % blockDim.x) * V + slot / blockDim.x;
    if (c >= s.channels) continue;
    float sum = 0.0f;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += partial[(kind * blockDim.y + y) * tile_channels + slot];
    write_bin(bins, kind, ((b * s.channels + c) * s.pool_rows + i) * s.pool_columns + j, sum, area);
  }
}

// Block: warps, each with its (plane, row of bins). WHOLE: every 16-byte vector of a row lies in exactly one bin.
// lanes_x lanes side by side in a row, 32 / lanes_x rows at a time.
template <typename T, int UNIT, bool WHOLE>
__global__ void __launch_bounds__(kThreads, 2)
norm_act_pool_nchw(Image s, Norm norm, bool aligned, int lanes_x, int64_t items, const T* __restrict__ z,
                   T* __restrict__ out, BinOutputs bins) {
  constexpr int V = kVector<T>, kSlots = WHOLE ? 1 : V;
  LGK_DYNAMIC_SHARED(float, shared);  // for each warp (3, lanes_y, vectors * kSlots)
  const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (item >= items) return;  // the whole warp
  const int vectors = ceil_div(s.width, V), slots = vectors * kSlots, lanes_y = 32 / lanes_x;
  float* const partial = shared + threadIdx.y * 3 * lanes_y * slots;
  const int x = threadIdx.x % lanes_x, y = threadIdx.x / lanes_x;
  const int i = static_cast<int>(item % s.pool_rows);
  const int64_t plane = item / s.pool_rows;
  const Span rows = span(i, s.height, s.pool_rows);
  const Channel p = channel(norm, static_cast<int>(plane % s.channels));
  const int out_height = s.height / UNIT, out_width = s.width / UNIT;
  const int first_unit = rows.begin / UNIT, end_unit = (rows.end - 1) / UNIT + 1;
  constexpr int kUnits = kLoads / UNIT;

  for (int vector = x; vector < vectors; vector += lanes_x) {
    const int w0 = vector * V, count = s.width - w0;
    BinSums sums[kSlots];
    for (int first = first_unit + y; first < end_unit; first += lanes_y * kUnits) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int unit = first + q / UNIT * lanes_y, h = unit * UNIT + q % UNIT;
        if (unit < end_unit && h < s.height)
          pack[q] = load<T, V>(z + (plane * s.height + h) * s.width + w0, count, aligned);
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = first + u * lanes_y;
        if (unit >= end_unit) continue;
        float a[UNIT][V];
#pragma unroll
        for (int r = 0; r < UNIT; ++r) {
          const int h = unit * UNIT + r;
          if (h >= s.height) continue;
          const bool row_in_bin = h >= rows.begin && h < rows.end;
#pragma unroll
          for (int v = 0; v < V; ++v)
            a[r][v] = activate(p, norm.slope, to_float(pack[u * UNIT + r].element[v]),
                               row_in_bin && (WHOLE || v < count), sums[WHOLE ? 0 : v]);
        }
        if (out == nullptr || unit * UNIT < rows.own) continue;
        if constexpr (UNIT == 1) {
          store<T, V>(out + (plane * s.height + unit) * s.width + w0, a[0], count, aligned);
        } else if (unit < out_height) {
          float best[V / 2];
#pragma unroll
          for (int v = 0; v < V / 2; ++v)
            best[v] = larger(larger(larger(a[0][2 * v], a[0][2 * v + 1]), a[1][2 * v]), a[1][2 * v + 1]);
          store<T, V / 2>(out + (plane * out_height + unit) * out_width + w0 / 2, best, out_width - w0 / 2, aligned);
        }
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float value[3] = {sums[slot].a, sums[slot].s1, sums[slot].s2};
#pragma unroll
      for (int kind = 0; kind < 3; ++kind)
        partial[(kind * lanes_y + y) * slots + vector * kSlots + slot] = value[kind];
    }
  }
  __syncwarp();
  for (int k = threadIdx.x; k < 3 * s.pool_columns; k += 32) {
    const int kind = k / s.pool_columns, j = k % s.pool_columns;
    const Span columns = span(j, s.width, s.pool_columns);
    const int begin = WHOLE ? columns.begin / V : columns.begin, end = WHOLE ? columns.end / V : columns.end;
    float sum = 0.0f;
    for (int row = 0; row < lanes_y; ++row)
      for (int slot = begin; slot < end; ++slot) sum += partial[(kind * lanes_y + row) * slots + slot];
    write_bin(bins, kind, (plane * s.pool_rows + i) * s.pool_columns + j, sum,
              (rows.end - rows.begin) * (columns.end - columns.begin));
  }
}

bool bins_are_whole_vectors(const Image& s, int vector) {
  return s.width % s.pool_columns == 0 && s.width / s.pool_columns % vector == 0;
}

template <typename T, int UNIT>
int launch_norm_act_pool(const Image& s, const Norm& norm, const T* z, T* out, const BinOutputs& bins, void* stream) {
  constexpr int V = kVector<T>;
  const bool pointers_aligned = is_aligned(z, 16) && is_aligned(out, 16);
  if (s.channels_last) {
    const int x = power_of_two_from(ceil_div(s.channels, V), 32);
    const int largest_bin = ceil_div(s.height, s.pool_rows) * ceil_div(s.width, s.pool_columns);
    const int y = power_of_two_from(std::max(largest_bin / kLoads, 32 / x), kThreads / x);
    const int64_t blocks = s.batch * s.pool_rows * s.pool_columns * ceil_div(s.channels, x * V);
    const bool aligned = pointers_aligned && s.channels % V == 0;
    LGK_LAUNCH((norm_act_pool_nhwc<T, UNIT>), dim3(blocks), dim3(x, y), 3 * x * y * V * sizeof(float), stream, s, norm,
               aligned, z, out, bins);
    return launch_status();
  }
  const int vectors = ceil_div(s.width, V), lanes_x = power_of_two_from(vectors, 32);
  const bool whole = bins_are_whole_vectors(s, V), aligned = pointers_aligned && s.width % V == 0;
  const int warp_bytes = 3 * (32 / lanes_x) * vectors * (whole ? 1 : V) * static_cast<int>(sizeof(float));
  if (warp_bytes > kMaxShared) return 1;  // rows beyond 4096 elements: the caller takes channels_last
  const int warps = std::min(kWarps, kMaxShared / warp_bytes);
  const int64_t items = s.batch * s.channels * s.pool_rows;
  const dim3 grid(ceil_div<int64_t>(items, warps)), block(32, warps);
  if (whole) {
    LGK_LAUNCH((norm_act_pool_nchw<T, UNIT, true>), grid, block, warps * warp_bytes, stream, s, norm, aligned, lanes_x,
               items, z, out, bins);
  } else {
    LGK_LAUNCH((norm_act_pool_nchw<T, UNIT, false>), grid, block, warps * warp_bytes, stream, s, norm, aligned,
               lanes_x, items, z, out, bins);
  }
  return launch_status();
}

}  // namespace

int lls_norm_act_pool(const Image& image, const Norm& norm, const void* z, bool max_pool, void* out, float* latents,
                      float* s1, float* s2, void* stream) {
  if (image.batch * image.channels == 0) return 0;
  return with_dtype(image.dtype, [&](auto element) {
    using T = decltype(element);
    const BinOutputs bins{latents, s1, s2};
    return max_pool ? launch_norm_act_pool<T, 2>(image, norm, static_cast<const T*>(z), static_cast<T*>(out), bins, stream)
                    : launch_norm_act_pool<T, 1>(image, norm, static_cast<const T*>(z), static_cast<T*>(out), bins, stream);
  });
}

}  // namespace lgk
