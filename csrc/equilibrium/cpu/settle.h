// Dense nets that settle. Weights are packed once; rows are independent, so each thread takes chunks of samples, of all
// phases, through all steps by itself, their states in its cache. A complex sample (Re, Im), and one with its tangent,
// is a pair of rows. Of an error the last step's activities are added up where they lie: no phase's states are stored.
//
// With a tolerance the net stops at the first step at which all samples have settled: every chunk goes on to its own
// first, then to the latest of these and its own first from there on, until they agree.
#pragma once
#include <cmath>
#include <memory>

#include "equilibrium/cpu/chunk.h"
#include "equilibrium/cpu/force.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kChunkRows = 96;

// -- a step -----------------------------------------------------------------------------------------------------------

inline void nudge_rows(const Settlement& s, Chunk& c) {
  const int last = s.last();
  const StateReadout& readout = s.net.readout;
  const int64_t units = s.net.layers[last].units;
  const bool mse = s.options.loss == StateLoss::kMse;
  const int64_t n = mse ? units : readout.classes;
  const float* r = c.r[c.current[last % 2]] + s.placed[last].column;
  if (s.by_readout()) {
    const Operand operand = {r, s.stride, units};
    const auto keep = [&](int64_t row, int64_t rows, int64_t j, int vectors, const float* tile) {
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(c.nudge + (row + i) * s.logits + j, tile + i * vectors * V, vectors * V * sizeof(float));
    };
    multiply_panels(0, c.real, 1, &operand, 1, s.readout, units, n, keep);
    multiply_panels(c.real, c.rows, 2, &operand, 1, s.readout, units, n, keep);
  } else {
    for (int64_t i = 0; i < c.rows; ++i) std::memcpy(c.nudge + i * s.logits, r + i * s.stride, n * sizeof(float));
  }
  for (int64_t i = 0; i < c.rows; i += i < c.real ? 1 : 2) {
    const float* goal = readout.goal + c.at[i].sample * n;
    const float* beta = s.phases.beta + 2 * (c.at[i].item / s.phases.samples);
    float *z = c.nudge + i * s.logits, *second = z + s.logits;
    for (int64_t j = 0; j < n && !mse && readout.bias; ++j) z[j] += readout.bias[j];
    if (i >= c.real && !s.tangent()) {
      nudge_complex(z, second, n, goal, mse, beta);
      continue;
    }
    nudge_real(z, n, goal, mse, i < c.real ? beta[0] : 1.f);
    if (i < c.real) continue;
    std::memcpy(second, z, n * sizeof(float));
    std::memset(z, 0, n * sizeof(float));
  }
}

// u = tile + drive + nudge of `rows` rows of a layer, and its activities.
template <StateActivation A, StatePair PAIR>
inline void finish_states(const Settlement& s, const Chunk& c, int layer, int64_t row, int64_t rows, int64_t column,
                          int vectors, const float* tile, bool record, bool measure) {
  constexpr int kRows = PAIR == StatePair::kNone ? 1 : 2;
  const bool direct = s.logits && layer == s.last() && !s.by_readout();
  const int64_t place = s.placed[layer].column + column;
  float* r = c.r[1 - c.current[layer % 2]];
  float *now = c.u[(c.taken + 1) % 3], *before = c.u[c.taken % 3], *earlier = c.u[(c.taken + 2) % 3];
  for (int64_t i = row; i < row + rows; i += kRows, tile += kRows * vectors * V) {
    const int64_t at = i * s.stride + place;
    const float* drive = s.drive + c.at[i].sample * s.stride + place;
    vf sums[2] = {};
    for (int n = 0; n < vectors; ++n) {
      vf u[2] = {load(tile + n * V) + load(drive + n * V)};
      if (kRows == 2) u[1] = load(tile + (vectors + n) * V);
      for (int k = 0; k < kRows; ++k) {
        const int64_t here = at + k * s.stride + n * V;
        if (direct) u[k] += load(c.nudge + (i + k) * s.logits + column + n * V);
        if (record) store(now + here, u[k]);
        if (measure && !(PAIR == StatePair::kTangent && k == 1)) {
          const vf a = u[k] - load(before + here), b = u[k] - load(earlier + here);
          sums[0] += a * a, sums[1] += b * b;
        }
      }
      activate<A, PAIR>(r + at + n * V, s.stride, u[0], u[1]);
    }
    if (measure)
      for (int k = 0; k < 2; ++k) {
        float* moved = c.moved + (i * 2 + k) * V;
        store(moved, load(moved) + sums[k]);
      }
  }
}

template <StateActivation A>
inline void step_layer(const Settlement& s, Chunk& c, int layer, bool record, bool measure) {
  int count = 0;
  for (const StateEdge* e = s.net.edges; e < s.net.edges + s.net.edge_count; ++e)
    if (e->target == layer)
      c.operands[count++] = {c.r[c.current[e->source % 2]] + s.placed[e->source].column, s.stride,
                             s.net.layers[e->source].units};
  if (layer == s.last() && s.by_readout()) c.operands[count++] = {c.nudge, s.logits, s.net.readout.classes};
  const PlacedLayer& p = s.placed[layer];
  const int64_t units = s.net.layers[layer].units;
  const auto finish = [&](auto pair) {
    return
        [&s, &c, layer, record, measure, pair](int64_t row, int64_t rows, int64_t j, int vectors, const float* tile) {
          finish_states<A, decltype(pair)::value>(s, c, layer, row, rows, j, vectors, tile, record, measure);
        };
  };
  using None = std::integral_constant<StatePair, StatePair::kNone>;
  using Tangent = std::integral_constant<StatePair, StatePair::kTangent>;
  using Imaginary = std::integral_constant<StatePair, StatePair::kComplex>;
  multiply_panels(0, c.real, 1, c.operands, count, p.panels, p.depth, units, finish(None()));
  if (s.tangent())
    multiply_panels(c.real, c.rows, 2, c.operands, count, p.panels, p.depth, units, finish(Tangent()));
  else if constexpr (A == StateActivation::kSigmoid || A == StateActivation::kDsilu)
    multiply_panels(c.real, c.rows, 2, c.operands, count, p.panels, p.depth, units, finish(Imaginary()));
}

// Norms of the last moves into the report; whether all samples have settled.
inline bool judge(const Settlement& s, const Chunk& c) {
  bool all = true;
  const float tolerance = s.options.tolerance;
  for (int64_t i = 0; i < c.rows; i += i < c.real ? 1 : 2) {
    const int64_t item = c.at[i].item;
    float norms[2];
    for (int k = 0; k < 2; ++k) norms[k] = std::sqrt(sum(load(c.moved + (i * 2 + k) * V)));
    if (c.taken < 2) norms[1] = INFINITY;
    s.report.residual[item] = norms[0], s.report.orbit[item] = norms[1];
    const bool settled = norms[0] <= tolerance || norms[1] <= tolerance;
    int64_t& steps = s.report.steps[item];
    if (!settled)
      steps = INT64_MAX;
    else if (steps > c.taken)
      steps = c.taken;
    all = all && settled;
  }
  return all;
}

// Steps until the chunk has taken `least` of them and has settled.
template <StateActivation A>
inline void advance(const Settlement& s, Chunk& c, int64_t least) {
  const bool tolerant = s.options.tolerance >= 0;
  while (c.taken < s.options.steps && !(c.taken >= least && c.done)) {
    const bool measure = tolerant || c.taken + 1 == s.options.steps,
               record = tolerant || c.taken + 3 >= s.options.steps;
    if (measure) std::memset(c.moved, 0, c.rows * 2 * V * sizeof(float));
    const bool together = s.options.schedule == StateSchedule::kSynchronous;
    for (int part = 0; part < (together ? 1 : 2); ++part) {
      if (s.logits && (together || s.last() % 2 == part)) nudge_rows(s, c);
      for (int layer = part; layer < s.net.layer_count; layer += together ? 1 : 2)
        step_layer<A>(s, c, layer, record, measure);
      for (int k = 0; k < 2; ++k)
        if (together || k == part) c.current[k] = 1 - c.current[k];
    }
    ++c.taken;
    if (measure) c.done = judge(s, c);
  }
}

// -- all steps of all chunks ------------------------------------------------------------------------------------------

template <StateActivation A>
inline int settle_rows(const Settlement& s, int threads) {
  const int64_t samples = s.phases.samples, each = s.rows_each(), rows = samples * each;
  const int64_t width = rounded(5 * s.stride + s.logits + 2 * V, kApart), operand_count = s.net.edge_count + 1;
  const int64_t chunks = smaller((rows + kChunkRows * threads - 1) / (kChunkRows * threads) * threads, samples);
  const int64_t most = (samples + chunks - 1) / chunks * each;
  const bool tolerant = s.options.tolerance >= 0;  // then a chunk may have to go on when the others are done
  const int64_t kept = tolerant ? chunks : smaller(chunks, threads);
  Scratch memory(width * most, static_cast<int>(kept));
  const std::unique_ptr<Chunk[]> all(new Chunk[chunks]());
  const std::unique_ptr<Operand[]> operands(new Operand[kept * operand_count]);
  const std::unique_ptr<RowPlace[]> places(new RowPlace[kept * most]);
  if (!memory) return 1;
  const auto begin_chunk = [&](int64_t i, int64_t place) {
    Chunk& c = all[i];
    c.first = samples * i / chunks, c.samples = samples * (i + 1) / chunks - c.first;
    c.rows = c.samples * each, c.real = c.samples * s.phases.real_phases;
    c.operands = operands.get() + place * operand_count, c.at = places.get() + place * most;
    float* p = memory.of(static_cast<int>(place));
    for (float*& part : c.u) part = p, p += c.rows * s.stride;
    for (float*& part : c.r) part = p, p += c.rows * s.stride;
    c.moved = p, p += c.rows * 2 * V;
    c.nudge = p;
    place_rows(s, c);
    begin_rows<A>(s, c);
  };
  int64_t work = 0;
  for (int layer = 0; layer < s.net.layer_count; ++layer)
    work += rows * (s.placed[layer].depth + 1) * s.net.layers[layer].units;
  work *= smaller(s.options.steps, 1024) + 1;
  for (int64_t least = -1;;) {
    parallel(chunks, work, threads, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        if (least < 0) begin_chunk(i, tolerant ? i : thread);
        advance<A>(s, all[i], least);
        if (!tolerant) end_rows<A>(s, all[i]);
      }
    });
    if (!tolerant) return 0;
    int64_t latest = 0;
    bool agreed = true;
    for (int64_t i = 0; i < chunks; ++i) latest = all[i].taken > latest ? all[i].taken : latest;
    for (int64_t i = 0; i < chunks; ++i) agreed = agreed && all[i].taken == latest;
    if (agreed) break;
    least = latest;
  }
  for (int64_t i = 0; i < chunks; ++i) end_rows<A>(s, all[i]);
  return 0;
}

inline int settle(const StateNet& net, const StatePhases& phases, const Settling& options, const StateReport& report,
                  int threads) {
  const int last = net.layer_count - 1;
  Settlement s = {net, phases, options, report, nullptr, nullptr, nullptr, 0, 0};
  if (net.readout.goal)
    s.logits = rounded(options.loss == StateLoss::kMse ? net.layers[last].units : net.readout.classes, kApart) + kApart;
  const std::unique_ptr<PlacedLayer[]> placed(new PlacedLayer[net.layer_count]());
  s.placed = placed.get();
  for (const StateEdge* e = net.edges; e < net.edges + net.edge_count; ++e)
    placed[e->target].depth += net.layers[e->source].units;
  if (s.by_readout()) placed[last].depth += net.readout.classes;
  int64_t weights = 0;
  for (int layer = 0; layer < net.layer_count; ++layer) {
    placed[layer].column = s.stride;
    s.stride += rounded(net.layers[layer].units, kApart) + kApart;
    weights += placed[layer].depth * rounded(net.layers[layer].units, kApart);
  }
  const int64_t readout = s.by_readout() ? net.layers[last].units * rounded(net.readout.classes, kApart) : 0;
  Scratch memory(weights + readout + phases.samples * s.stride, 1);
  if (!memory) return 1;
  float* p = memory.of(0);
  for (int layer = 0; layer < net.layer_count; ++layer) {
    placed[layer].panels = p;
    p += placed[layer].depth * rounded(net.layers[layer].units, kApart);
  }
  s.readout = p, s.drive = p + readout;
  place(s, threads);
  switch (options.activation) {
    case StateActivation::kSigmoid: return settle_rows<StateActivation::kSigmoid>(s, threads);
    case StateActivation::kDsilu: return settle_rows<StateActivation::kDsilu>(s, threads);
    case StateActivation::kHardSigmoid: return settle_rows<StateActivation::kHardSigmoid>(s, threads);
    default: return settle_rows<StateActivation::kClippedRelu>(s, threads);
  }
}

}  // namespace lgk::cpu::LGK_ISA
