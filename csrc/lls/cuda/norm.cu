// LLS block, one pass over z: normalise, activate, max-pool, pool the latents and gather s1 and s2.
//
//   xhat = (z - mean) rstd,  u = gamma xhat + beta,  a = u > 0 ? u : slope u,  lambda = u > 0 ? 1 : slope
//   latents = mean of a over each bin,  s1 = sum of lambda,  s2 = sum of lambda xhat
//
// channels_last: one block per bin and tile of channels; a thread keeps 16 bytes of channels and walks over positions.
// NCHW: one warp per plane and row of bins; a thread keeps 16 bytes of columns and walks over rows.
#include "lls/cuda/bins.h"

namespace lgk::cuda {
namespace {

// torch's max pooling: a nan wins.
LGK_DEVICE float larger(float best, float value) { return value > best || value != value ? value : best; }

// Over the positions of a bin. The sum of a follows: a = lambda u = gain lambda (z - mean) + beta lambda.
struct BinSums {
  float lambda = 0.0f, centred = 0.0f;  // sums of lambda and of lambda (z - mean)
};

// Activation of one element; counts it into `sums` where it lies in the bin.
LGK_DEVICE float activate(const Channel& p, float slope, float z, bool in_bin, BinSums& sums) {
  const float centred = z - p.mean, u = preactivation(p, centred);
  const float lambda = u > 0.0f ? 1.0f : slope;
  if (in_bin) {
    sums.lambda += lambda;
    sums.centred = fmaf(lambda, centred, sums.centred);
  }
  return lambda * u;
}

struct BinOutputs {
  float *latents, *s1, *s2;
};

LGK_DEVICE void write_bin(const BinOutputs& out, const Norm& norm, int c, int64_t index, const BinSums& sums,
                          int area) {
  const Channel p = channel(norm, c);
  out.latents[index] = fmaf(p.gain, sums.centred, p.beta * sums.lambda) / static_cast<float>(area);
  if (out.s1 == nullptr) return;
  out.s1[index] = sums.lambda;
  out.s2[index] = sums.centred * rstd(norm, c);
}

// -- normalise, activate, pool ------------------------------------------------------------------------------------

// UNIT x UNIT positions make one position of `out` (2: max-pool). Block (channel vectors, positions).
template <typename T, int UNIT>
__global__ void __launch_bounds__(kThreads, 2)
    norm_act_pool_nhwc(Image s, Norm norm, bool aligned, const T* __restrict__ z, T* __restrict__ out,
                       BinOutputs bins) {
  constexpr int V = kVector<T>;
  LGK_DYNAMIC_SHARED(float, partial);  // (2, blockDim.y, V, blockDim.x)
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
    const T* const sample = z + b * s.height * s.width * s.channels + c0;
    const int64_t out_base = b * out_height * out_width * s.channels + c0;
    constexpr int kUnits = UNIT == 1 ? kLoads : 1, kSide = UNIT;
    constexpr int kInFlight = UNIT == 2 && V == 8 ? 2 : kLoads;  // with four the widest vectors spill at 128 registers
    for (int first = threadIdx.y; first < units; first += blockDim.y * kUnits) {
      int h[kUnits], w[kUnits];  // the unit's corner; beyond the image where there is no unit
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = first + u * static_cast<int>(blockDim.y);
        h[u] = unit < units ? (unit_row + unit / unit_columns) * UNIT : s.height;
        w[u] = (unit_column + unit % unit_columns) * UNIT;
      }
      float best[V];
#pragma unroll
      for (int start = 0; start < kLoads; start += kInFlight) {
        Pack<T, V> pack[kInFlight];
#pragma unroll
        for (int q = start; q < start + kInFlight; ++q) {
          const int u = UNIT == 1 ? q : 0, row = h[u] + q / kSide % UNIT, column = w[u] + q % kSide;
          if (row < s.height && column < s.width)
            pack[q - start] = load<T, V>(sample + (row * s.width + column) * s.channels, channels, aligned);
        }
#pragma unroll
        for (int q = start; q < start + kInFlight; ++q) {
          const int u = UNIT == 1 ? q : 0, row = h[u] + q / kSide % UNIT, column = w[u] + q % kSide;
          if (row >= s.height || column >= s.width) continue;
          const bool in_bin =
              UNIT == 1 || (row >= rows.begin && row < rows.end && column >= columns.begin && column < columns.end);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float a = activate(p[v], norm.negative_slope, to_float(pack[q - start].element[v]), in_bin, sums[v]);
            best[v] = UNIT == 1 || q == 0 ? a : larger(best[v], a);
          }
          const bool last = UNIT == 1 || q == kLoads - 1;
          const bool owned = UNIT == 1 ? h[u] < rows.owned && w[u] < columns.owned  // and inside of the bin
                                       : rows.owns(h[u]) && columns.owns(w[u]);
          if (last && owned && out != nullptr)
            store<T, V>(out + out_base + (h[u] / UNIT * out_width + w[u] / UNIT) * s.channels, best, channels, aligned);
        }
      }
    }
  }

  const int plane = blockDim.y * tile_channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int slot = (threadIdx.y * V + v) * blockDim.x + threadIdx.x;
    partial[slot] = sums[v].lambda;
    partial[plane + slot] = sums[v].centred;
  }
  __syncthreads();
  const int area = (rows.end - rows.begin) * (columns.end - columns.begin);
  for (int slot = threadIdx.y * blockDim.x + threadIdx.x; slot < tile_channels; slot += blockDim.x * blockDim.y) {
    const int c = (tile * blockDim.x + slot % blockDim.x) * V + slot / blockDim.x;
    if (c >= s.channels) continue;
    BinSums total;
    for (int k = slot; k < plane; k += tile_channels) {
      total.lambda += partial[k];
      total.centred += partial[plane + k];
    }
    write_bin(bins, norm, c, ((b * s.channels + c) * s.pool_rows + i) * s.pool_columns + j, total, area);
  }
}

// Block: warps, each with its (plane, row of bins). WHOLE: every 16-byte vector of a row lies in exactly one bin.
// lanes_x lanes side by side in a row, 32 / lanes_x rows at a time.
template <typename T, int UNIT, bool WHOLE>
__global__ void __launch_bounds__(kThreads, 2)
    norm_act_pool_nchw(Image s, Norm norm, bool aligned, int lanes_x, int64_t items, const T* __restrict__ z,
                       T* __restrict__ out, BinOutputs bins) {
  constexpr int V = kVector<T>, kSlots = WHOLE ? 1 : V;
  LGK_DYNAMIC_SHARED(float, shared);  // for each warp (2, lanes_y, vectors * kSlots)
  const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (item >= items) return;  // the whole warp
  const int vectors = ceil_div(s.width, V), slots = vectors * kSlots, lanes_y = 32 / lanes_x;
  float* const partial = shared + threadIdx.y * 2 * lanes_y * slots;
  const int x = threadIdx.x % lanes_x, y = threadIdx.x / lanes_x;
  const int i = static_cast<int>(item % s.pool_rows);
  const int64_t plane = item / s.pool_rows;
  const Span rows = span(i, s.height, s.pool_rows);
  const int c = static_cast<int>(plane % s.channels);
  const Channel p = channel(norm, c);
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
            a[r][v] = activate(p, norm.negative_slope, to_float(pack[u * UNIT + r].element[v]),
                               row_in_bin && (WHOLE || v < count), sums[WHOLE ? 0 : v]);
        }
        if (out == nullptr || !rows.owns(unit * UNIT)) continue;
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
      const int k = y * slots + vector * kSlots + slot;
      partial[k] = sums[slot].lambda;
      partial[lanes_y * slots + k] = sums[slot].centred;
    }
  }
  __syncwarp();
  for (int j = threadIdx.x; j < s.pool_columns; j += 32) {
    const Span columns = span(j, s.width, s.pool_columns);
    const int begin = WHOLE ? columns.begin / V : columns.begin, end = WHOLE ? columns.end / V : columns.end;
    BinSums total;
    for (int row = 0; row < lanes_y; ++row) {
      for (int slot = begin; slot < end; ++slot) {
        total.lambda += partial[row * slots + slot];
        total.centred += partial[(lanes_y + row) * slots + slot];
      }
    }
    write_bin(bins, norm, c, item * s.pool_columns + j, total, (rows.end - rows.begin) * (columns.end - columns.begin));
  }
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
    LGK_LAUNCH((norm_act_pool_nhwc<T, UNIT>), dim3(blocks), dim3(x, y), 2 * x * y * V * sizeof(float), stream, s, norm,
               aligned, z, out, bins);
    return launch_status();
  }
  const int vectors = ceil_div(s.width, V), lanes_x = row_lanes(s, V);
  const bool whole = bins_are_whole_vectors(s, V), aligned = pointers_aligned && s.width % V == 0;
  const int warp_bytes = 2 * (32 / lanes_x) * vectors * (whole ? 1 : V) * static_cast<int>(sizeof(float));
  if (warp_bytes > kMaxShared) return kInvalidArgument;  // rows beyond 6144 elements: the caller takes channels_last
  const int warps = std::min(kThreads / 32, kMaxShared / warp_bytes);
  const int64_t items = s.batch * s.channels * s.pool_rows;
  const dim3 grid(ceil_div<int64_t>(items, warps)), block(32, warps);
  if (whole) {
    LGK_LAUNCH((norm_act_pool_nchw<T, UNIT, true>), grid, block, warps * warp_bytes, stream, s, norm, aligned, lanes_x,
               items, z, out, bins);
  } else {
    LGK_LAUNCH((norm_act_pool_nchw<T, UNIT, false>), grid, block, warps * warp_bytes, stream, s, norm, aligned, lanes_x,
               items, z, out, bins);
  }
  return launch_status();
}

}  // namespace

int lls_norm_act_pool(const Image& image, const Norm& norm, const void* z, bool max_pool, void* out, float* latents,
                      float* s1, float* s2, void* stream) {
  if (image.batch * image.channels == 0) return 0;
  if (!fits(image)) return kInvalidArgument;
  return with_dtype(image.dtype, [&](auto element) {
    using T = decltype(element);
    const BinOutputs bins{latents, s1, s2};
    return max_pool
               ? launch_norm_act_pool<T, 2>(image, norm, static_cast<const T*>(z), static_cast<T*>(out), bins, stream)
               : launch_norm_act_pool<T, 1>(image, norm, static_cast<const T*>(z), static_cast<T*>(out), bins, stream);
  });
}

}  // namespace lgk::cuda
