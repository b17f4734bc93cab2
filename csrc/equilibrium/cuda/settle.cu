// Dense nets that settle: all steps in one launch.
//
// Rows are independent, so a block takes a few of them through all steps by itself: their activities, now and next, lie
// in shared memory, and the weights come from the L2 cache at every step. Counted for 784-256-256-10 (545 KB of
// recurrent weights, 4 KB of activities a row): a block of any number of rows reads the 545 KB a step, which no block
// of sm_86 or sm_120 can keep (100 KB), nor one of sm_90 (228 KB). A cluster of four could, on sm_90 alone, for a
// barrier across it and the activities' way through it at each step. Nothing else moves: no state leaves the block
// before the end, and no block waits for another. So the time of a step is that of 545 KB through one multiprocessor,
// whatever the batch, as long as each has one block: 4 rows, 528 of them at a time on 132 multiprocessors. A larger
// batch is better served by the products of all its rows at once (the Triton step, the library).
//
// A warp takes 32 units of a layer, or a part of their sums where units are few; a lane has one unit of all rows.
// A complex sample (Re, Im), and one with its tangent, is a pair of rows.
#include "common/cuda/rows.h"
#include "equilibrium/cuda/force.h"

namespace lgk::cuda {
namespace settling {

constexpr int kAdders = 256;  // threads of a block of add_phases

// -- a step -----------------------------------------------------------------------------------------------------------

template <int R>
struct Memory {
  Rows<R>*r, *z, *partial;  // activities (2, units), the force (nudge), a thread's sums
};

// The state after step `t` (0: the start), of the last two steps.
template <int R>
LGK_DEVICE float state_after(const Problem& p, const Own& own, int layer, int unit, int k, int64_t t) {
  if (t > 0) return p.report.scratch[(t % 2 * p.rows + own.kept(p, k)) * p.units + p.column[layer] + unit];
  if (p.wanted != StateWanted::kStates && own.part(k) == 1) return 0.0f;
  const int64_t row = p.wanted == StateWanted::kStates ? own.row(p, k) : own.item(k) % p.samples;
  return p.layers[layer].start[row * p.layers[layer].units + unit];
}

// Step number t, from 1 on, of a layer; moves: sums of squares of the last step's moves, and of the last two's.
template <int R>
LGK_DEVICE void step_layer(const Problem& p, const Own& own, const Memory<R>& m, int layer, int even, int odd,
                           int64_t t, float (&moves)[2][R]) {
  const StateLayer& layer_of = p.layers[layer];
  const int units = static_cast<int>(layer_of.units);
  const bool nudged = p.nudge > 0 && layer == p.layer_count - 1, final = t == p.options.steps;
  Rows<R>* out = m.r + (1 - (layer % 2 == 0 ? even : odd)) * p.units + p.column[layer];
  over_units<R>(
      units, m.partial,
      [&](int unit, int part, int parts, float (&sum)[R]) {
        for (int e = 0; e < p.edge_count; ++e) {
          const StateEdge& edge = p.edges[e];
          if (edge.target != layer) continue;
          const int depth = static_cast<int>(p.layers[edge.source].units);
          multiply<R>(m.r + (edge.source % 2 == 0 ? even : odd) * p.units + p.column[edge.source], edge.weight + unit,
                      units, share(depth, part, parts), share(depth, part + 1, parts), sum);
        }
        if (nudged && p.by_readout())
          multiply<R>(m.z, p.readout.weight + int64_t{unit} * p.nudge, 1, share(p.nudge, part, parts),
                      share(p.nudge, part + 1, parts), sum);
      },
      [&](int unit, const float (&sum)[R]) {
        float u[R];
#pragma unroll
        for (int k = 0; k < R; ++k) {
          u[k] = sum[k];
          if (layer_of.drive != nullptr && own.part(k) == 0)
            u[k] += layer_of.drive[own.item(k) % p.samples * units + unit];
          if (nudged && !p.by_readout()) u[k] += m.z[unit].element[k];
        }
        activate<R>(p, own, u, out + unit);
        if (t + 2 < p.options.steps) return;
#pragma unroll
        for (int k = 0; k < R; ++k) {
          if (!final) {
            if (own.exists(k))
              p.report.scratch[(t % 2 * p.rows + own.kept(p, k)) * p.units + p.column[layer] + unit] = u[k];
            continue;
          }
          if (own.kind != Kind::kTangent || k % 2 == 0) {
            const float a = u[k] - state_after<R>(p, own, layer, unit, k, t - 1);
            moves[0][k] += a * a;
            if (t >= 2) {
              const float b = u[k] - state_after<R>(p, own, layer, unit, k, t - 2);
              moves[1][k] += b * b;
            }
          }
          if (!own.exists(k)) continue;
          if (p.wanted == StateWanted::kStates)
            layer_of.result[own.row(p, k) * units + unit] = u[k];
          else if (p.wanted == StateWanted::kError)  // where the state before the last one was
            p.report.scratch[(t % 2 * p.rows + own.kept(p, k)) * p.units + p.column[layer] + unit] =
                out[unit].element[k];
          else if (k % 2 == 1)
            layer_of.result[own.item(k) * units + unit] = out[unit].element[k];
        }
      });
}

// Norms of the moves into the report. `partial`: a warp's sums of all rows.
template <int R>
LGK_DEVICE void report_moves(const Problem& p, const Own& own, const float (&moves)[2][R], Rows<R>* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int back = 0; back < 2; ++back)
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const float sum = warp_sum(moves[back][k]);
      if (lane == 0) partial[back * kWarps + warp].element[k] = sum;
    }
  __syncthreads();
  if (threadIdx.x >= R) return;
  const int k = threadIdx.x;
  if (own.part(k) != 0 || !own.exists(k)) return;
  const int64_t taken = p.options.steps;
  float norms[2];
  for (int back = 0; back < 2; ++back) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      sum += partial[back * kWarps + w].element[k];
      if (own.kind == Kind::kComplex) sum += partial[back * kWarps + w].element[k + 1];
    }
    norms[back] = taken > back ? sqrtf(sum) : INFINITY;
  }
  if (own.kind == Kind::kTangent && taken == 0) norms[0] = 0.0f;
  p.report.residual[own.item(k)] = norms[0];
  p.report.orbit[own.item(k)] = norms[1];
}

template <int R>
__global__ void __launch_bounds__(kThreads, 1) settle_rows(const LGK_GRID_CONSTANT Problem p) {
  LGK_DYNAMIC_SHARED(float, shared);
  const Own own = own_rows<R>(p);
  Rows<R>* first = reinterpret_cast<Rows<R>*>(shared);
  const Memory<R> m = {first, first + 2 * p.units, first + 2 * p.units + p.nudge};
  const int last = p.layer_count - 1;
  for (int layer = 0; layer <= last; ++layer)
    for (int unit = threadIdx.x; unit < p.layers[layer].units; unit += kThreads) {
      float u[R];
#pragma unroll
      for (int k = 0; k < R; ++k) {
        u[k] = state_after<R>(p, own, layer, unit, k, 0);
        if (p.options.steps == 0 && own.exists(k)) {
          if (p.wanted == StateWanted::kStates)
            p.layers[layer].result[own.row(p, k) * p.layers[layer].units + unit] = u[k];
          if (own.kind == Kind::kTangent && k % 2 == 1)
            p.layers[layer].result[own.item(k) * p.layers[layer].units + unit] = 0.0f;
        }
      }
      activate<R>(p, own, u, m.r + p.column[layer] + unit);
    }
  __syncthreads();
  int now[2] = {0, 0};  // which r the even and odd layers have
  float moves[2][R] = {};
  const bool together = p.options.schedule == StateSchedule::kSynchronous;
  for (int64_t t = 1; t <= p.options.steps; ++t)
    for (int part = 0; part < (together ? 1 : 2); ++part) {
      const int even = now[0], odd = now[1];
      if (p.nudge > 0 && (together || last % 2 == part))
        force<R>(p, own, m.r + (last % 2 == 0 ? even : odd) * p.units + p.column[last], m.z, m.partial);
      for (int layer = part; layer <= last; layer += together ? 1 : 2)
        step_layer<R>(p, own, m, layer, even, odd, t, moves);
      __syncthreads();
      if (together || part == 0) now[0] = 1 - now[0];
      if (together || part == 1) now[1] = 1 - now[1];
    }
  report_moves<R>(p, own, moves, m.partial);
}

// The error, of the activities after the last step: each phase's difference to the free state's, by its share.
__global__ void __launch_bounds__(kAdders) add_phases(const LGK_GRID_CONSTANT Problem p) {
  const int64_t place = int64_t{blockIdx.x} * kAdders + threadIdx.x;
  if (place >= p.samples * p.units) return;
  const int64_t sample = place / p.units;
  const int column = static_cast<int>(place % p.units);
  int layer = p.layer_count - 1;
  while (p.column[layer] > column) --layer;
  const int64_t at = sample * p.layers[layer].units + column - p.column[layer];
  const float before = activity(p.options.activation, p.layers[layer].start[at]);
  const float* r = p.report.scratch + (p.options.steps % 2 * p.rows + sample) * p.units + column;
  const int64_t apart = p.samples * p.units;
  float sum = 0.0f;
  for (int phase = 0; p.options.steps > 0 && phase * p.samples < p.items; ++phase) {
    sum += (*r - before) * p.share[phase][0];
    if (phase * p.samples >= p.real) sum += *(r += apart) * p.share[phase][1];
    r += apart;
  }
  p.layers[layer].result[at] = sum;
}

template <int R>
size_t shared_bytes(const Problem& p) {
  return (2 * size_t(p.units) + size_t(p.nudge) + kThreads) * sizeof(Rows<R>);
}

template <int R>
int launch(Problem& p, void* stream) {
  const int64_t real = ceil_div<int64_t>(p.real, R), pairs = ceil_div<int64_t>(p.items - p.real, R / 2);
  if (real + pairs >= INT32_MAX) return kInvalidArgument;
  p.real_blocks = static_cast<unsigned>(real);
  LGK_LAUNCH(settle_rows<R>, dim3(static_cast<unsigned>(real + pairs)), dim3(kThreads), shared_bytes<R>(p), stream, p);
  if (p.wanted == StateWanted::kError) {
    const int64_t adders = ceil_div<int64_t>(p.samples * p.units, kAdders);
    if (adders >= INT32_MAX) return kInvalidArgument;
    LGK_LAUNCH(add_phases, dim3(static_cast<unsigned>(adders)), dim3(kAdders), 0, stream, p);
  }
  return launch_status();
}

}  // namespace settling

int equilibrium_settle(const std::vector<StateLayer>& layers, const std::vector<StateEdge>& edges,
                       const StateReadout& readout, const SettledPhases& phases, const Settling& options,
                       const SettledReport& report, void* stream) {
  using namespace settling;
  Problem p{};
  const int64_t many = static_cast<int64_t>(phases.beta_real.size());
  const int64_t shares = phases.wanted == StateWanted::kError ? many : 0;
  if (layers.empty() || layers.size() > kMostLayers || edges.size() > kMostEdges || many > kMostPhases ||
      phases.beta_imag.size() != phases.beta_real.size() || phases.share_real.size() != size_t(shares) ||
      phases.share_imag.size() != size_t(shares))
    return kInvalidArgument;
  int64_t units = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    p.layers[i] = layers[i];
    p.column[i] = static_cast<int>(units);
    units += layers[i].units;
  }
  for (size_t i = 0; i < edges.size(); ++i) p.edges[i] = edges[i];
  for (int64_t i = 0; i < many; ++i) p.beta[i][0] = phases.beta_real[i], p.beta[i][1] = phases.beta_imag[i];
  for (int64_t i = 0; i < shares; ++i) p.share[i][0] = phases.share_real[i], p.share[i][1] = phases.share_imag[i];
  p.layer_count = static_cast<int>(layers.size());
  p.edge_count = static_cast<int>(edges.size());
  p.readout = readout;
  p.report = report;
  p.options = options;
  p.samples = phases.samples;
  p.items = many * phases.samples;
  p.real = phases.wanted == StateWanted::kTangent ? 0 : phases.real_phases * phases.samples;
  p.rows = 2 * p.items - p.real;
  p.wanted = phases.wanted;
  const bool whole = options.loss == StateLoss::kMse || readout.weight == nullptr;
  const int64_t nudge = readout.goal == nullptr ? 0 : whole ? layers.back().units : readout.classes;
  if (2 * units + nudge > static_cast<int64_t>(kShared)) return kInvalidArgument;
  p.units = static_cast<int>(units);
  p.nudge = static_cast<int>(nudge);
  if (shared_bytes<4>(p) <= kShared) return launch<4>(p, stream);
  return shared_bytes<2>(p) <= kShared ? launch<2>(p, stream) : kInvalidArgument;
}

}  // namespace lgk::cuda
