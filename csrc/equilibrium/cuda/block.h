// What a block of rows of a net that settles is, and how its threads share the sums over units.
#pragma once
#include "common/cuda/rows.h"
#include "equilibrium/cuda/activations.h"
#include "equilibrium/cuda/kernels.h"

namespace lgk::cuda::settling {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kAhead = 8;  // weights of a lane in flight
constexpr size_t kShared = 48 * 1024;

enum class Kind { kReal, kComplex, kTangent };

struct Problem {
  StateLayer layers[kMostLayers];
  int column[kMostLayers];  // where its units lie in a row
  StateEdge edges[kMostEdges];
  float beta[kMostPhases][2], share[kMostPhases][2];
  StateReadout readout;
  SettledReport report;
  Settling options;
  int64_t samples, items, real, rows;         // items: of all phases, the first `real` ones real; rows of the scratch
  int layer_count, edge_count, units, nudge;  // units of a row; nudge: values of the force's row, 0: there is none
  unsigned real_blocks;
  StateWanted wanted;

  __host__ __device__ bool by_readout() const {
    return options.loss == StateLoss::kCrossEntropy && readout.weight != nullptr;
  }
};

// The rows of a block: items from `first` on, those beyond the last one are the last one again and write nothing.
struct Own {
  Kind kind;
  int64_t first, end;

  LGK_DEVICE int part(int k) const { return kind == Kind::kReal ? 0 : k % 2; }
  LGK_DEVICE int64_t item(int k) const { return min(first + (kind == Kind::kReal ? k : k / 2), end - 1); }
  LGK_DEVICE bool exists(int k) const { return first + (kind == Kind::kReal ? k : k / 2) < end; }
  // of the layers' tensors
  LGK_DEVICE int64_t row(const Problem& p, int k) const {
    const int64_t n = item(k);
    if (kind != Kind::kComplex) return n;
    const int64_t phase = (n - p.real) / p.samples;
    return p.real + (2 * phase + part(k)) * p.samples + (n - p.real) % p.samples;
  }
  // of the scratch
  LGK_DEVICE int64_t kept(const Problem& p, int k) const {
    return kind == Kind::kTangent ? item(k) * 2 + part(k) : row(p, k);
  }
};

template <int R>
LGK_DEVICE Own own_rows(const Problem& p) {
  if (blockIdx.x < p.real_blocks) return Own{Kind::kReal, int64_t{blockIdx.x} * R, p.real};
  const int64_t block = blockIdx.x - p.real_blocks;
  return Own{p.wanted == StateWanted::kTangent ? Kind::kTangent : Kind::kComplex, p.real + block * (R / 2), p.items};
}

template <int R>
using Rows = Pack<float, R>;

// sum[k] += r[n][k] weight[n stride] over n from begin to end
template <int R>
LGK_DEVICE void multiply(const Rows<R>* r, const float* __restrict__ weight, int64_t stride, int begin, int end,
                         float (&sum)[R]) {
  int n = begin;
  for (; n + kAhead <= end; n += kAhead) {
    float w[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) w[j] = weight[(n + j) * stride];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const Rows<R> a = r[n + j];
#pragma unroll
      for (int k = 0; k < R; ++k) sum[k] += a.element[k] * w[j];
    }
  }
  for (; n < end; ++n) {
    const float w = weight[n * stride];
    const Rows<R> a = r[n];
#pragma unroll
    for (int k = 0; k < R; ++k) sum[k] += a.element[k] * w;
  }
}

// Calls add(unit, part, parts, sum), which adds a part of the sums of a unit, and finish(unit, sum) of each of `units`.
// All threads of the block take part.
template <int R, class Add, class Finish>
LGK_DEVICE void over_units(int units, Rows<R>* partial, Add&& add, Finish&& finish) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = ceil_div(units, 32);
  int parts = 1;
  while (2 * parts * groups <= kWarps) parts *= 2;
  const int part = warp % parts;
  for (int group = warp / parts; group - warp / parts < groups; group += kWarps / parts) {
    const int unit = group * 32 + lane;
    const bool exists = unit < units;
    float sum[R] = {};
    if (exists) add(unit, part, parts, sum);
    if (parts > 1) {  // one turn of the loop, for all warps
#pragma unroll
      for (int k = 0; k < R; ++k) partial[threadIdx.x].element[k] = sum[k];
      __syncthreads();
      for (int other = 1; part == 0 && other < parts; ++other)
#pragma unroll
        for (int k = 0; k < R; ++k) sum[k] += partial[threadIdx.x + 32 * other].element[k];
    }
    if (exists && part == 0) finish(unit, sum);
    if (parts > 1) __syncthreads();
  }
}

LGK_DEVICE int share(int n, int part, int parts) { return static_cast<int>(int64_t{n} * part / parts); }

template <int R>
LGK_DEVICE void activate(const Problem& p, const Own& own, const float (&u)[R], Rows<R>* out) {
  const StateActivation kind = p.options.activation;
  Rows<R> r;
  if (own.kind == Kind::kReal) {
#pragma unroll
    for (int k = 0; k < R; ++k) r.element[k] = activity(kind, u[k]);
  } else if (own.kind == Kind::kTangent) {
#pragma unroll
    for (int k = 0; k < R; k += 2) {
      r.element[k] = activity(kind, u[k]);
      r.element[k + 1] = slope(kind, u[k]) * u[k + 1];
    }
  } else {
#pragma unroll
    for (int k = 0; k < R; k += 2) {
      const Pair z = complex_activity(kind, Pair{u[k], u[k + 1]});
      r.element[k] = z.re;
      r.element[k + 1] = z.im;
    }
  }
  *out = r;
}

}  // namespace lgk::cuda::settling
