// The rows that a thread takes through all steps of a net that settles: where they lie, how they begin, what becomes
// of them. See settle.h.
#pragma once
#include <cmath>

#include "equilibrium/cpu/activations.h"
#include "equilibrium/cpu/kernels.h"
#include "equilibrium/cpu/product.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kApart = 16;  // floats between rows, so that they do not all fall into the same lines of the cache

enum class StatePair : int { kNone, kComplex, kTangent };

struct PlacedLayer {
  int64_t column, depth;  // where its units lie in a row; the rows of its panels
  float* panels;
};

// What all chunks share.
struct Settlement {
  const StateNet& net;
  const StatePhases& phases;
  const Settling& options;
  const StateReport& report;
  PlacedLayer* placed;
  float *drive, *readout;  // (samples, stride); the readout's panels
  int64_t stride, logits;  // floats of a row; of the nudge's row, 0: there is none

  int last() const { return net.layer_count - 1; }
  bool tangent() const { return phases.wanted == StateWanted::kTangent; }
  bool by_readout() const { return logits && options.loss == StateLoss::kCrossEntropy && net.readout.weight; }
  int64_t rows_each() const { return 2 * phases.phases - phases.real_phases; }  // of a sample
};

// A row's place in the report (phases, samples), its sample, and its row of the layers' tensors.
struct RowPlace {
  int64_t item, sample, outer;
};

struct Chunk {
  int64_t first, samples, rows, real;  // its first sample; its rows, real phases' first: [phase][sample], then pairs
  RowPlace* at;
  float *u[3], *r[2], *moved, *nudge;  // moved: sums of squares, of a pair in its first row
  Operand* operands;
  int current[2];  // which r the even and odd layers have
  int64_t taken;
  bool done;
};

inline void place_rows(const Settlement& s, Chunk& c) {
  const int64_t all = s.phases.samples;
  for (int64_t i = 0; i < c.rows; ++i) {
    const int64_t pair = (i - c.real) / 2, own = i < c.real ? i : c.real + pair, phase = own / c.samples;
    const int64_t sample = c.first + own % c.samples;
    const int64_t row = i < c.real ? phase : 2 * phase - s.phases.real_phases + (i - c.real) % 2;
    c.at[i] = {phase * all + sample, sample, s.phases.wanted == StateWanted::kStates ? row * all + sample : sample};
  }
}

template <StateActivation A, StatePair PAIR>
LGK_INLINE void activate(float* r, int64_t apart, vf first_row, vf second_row) {
  if constexpr (PAIR == StatePair::kNone) {
    store(r, activity<A>(first_row));
  } else if constexpr (PAIR == StatePair::kTangent) {
    store(r, activity<A>(first_row));
    store(r + apart, slope<A>(first_row) * second_row);
  } else {
    const Complex z = complex_activity<A>({first_row, second_row});
    store(r, z.re), store(r + apart, z.im);
  }
}

// -- before and after -------------------------------------------------------------------------------------------------

template <StateActivation A>
inline void begin_rows(const Settlement& s, Chunk& c) {
  std::memset(c.u[0], 0, c.rows * s.stride * sizeof(float));
  std::memset(c.nudge, 0, c.rows * s.logits * sizeof(float));
  for (int layer = 0; layer < s.net.layer_count; ++layer) {
    const StateLayer& own = s.net.layers[layer];
    for (int64_t i = 0; i < c.rows; ++i)
      if (i < c.real || s.phases.wanted == StateWanted::kStates || (i - c.real) % 2 == 0)
        std::memcpy(c.u[0] + i * s.stride + s.placed[layer].column, own.start + c.at[i].outer * own.units,
                    own.units * sizeof(float));
  }
  for (int64_t i = 0; i < c.rows; i += i < c.real ? 1 : 2)
    for (int64_t j = 0; j < s.stride; j += V) {
      const float* u = c.u[0] + i * s.stride + j;
      float* r = c.r[0] + i * s.stride + j;
      if (i < c.real)
        activate<A, StatePair::kNone>(r, s.stride, load(u), vf{});
      else if (s.tangent())
        activate<A, StatePair::kTangent>(r, s.stride, load(u), load(u + s.stride));
      else
        activate<A, StatePair::kComplex>(r, s.stride, load(u), load(u + s.stride));
    }
  for (int64_t i = 0; i < c.rows; i += i < c.real ? 1 : 2) {
    const int64_t item = c.at[i].item;
    s.report.steps[item] = INT64_MAX;
    s.report.residual[item] = s.tangent() && !s.options.steps ? 0.f : INFINITY;
    s.report.orbit[item] = INFINITY;
  }
}

// e = sum over the phases of what r - phi(start) counts: by the differences, for the shares' sum is 0 (of one phase it
// is not, and phi(start) belongs there).
template <StateActivation A>
inline void add_phases(const Settlement& s, const Chunk& c, int layer) {
  const StateLayer& own = s.net.layers[layer];
  const float* r = c.r[c.current[layer % 2]] + s.placed[layer].column;
  for (int64_t b = 0; b < c.samples; ++b) {
    const int64_t row = (c.first + b) * own.units;
    for (int64_t j = 0; j < own.units; j += V) {
      const int64_t count = smaller(own.units - j, V);
      const vf before = activity<A>(load_some(own.start + row + j, count));
      vf total = {};
      const float* share = s.phases.share;
      for (int64_t i = b; i < c.real; i += c.samples, share += 2)
        total += (load(r + i * s.stride + j) - before) * share[0];
      for (int64_t i = c.real + 2 * b; i < c.rows; i += 2 * c.samples, share += 2)
        total += (load(r + i * s.stride + j) - before) * share[0] + load(r + (i + 1) * s.stride + j) * share[1];
      store_some(own.result + row + j, total, count);
    }
  }
}

template <StateActivation A>
inline void end_rows(const Settlement& s, const Chunk& c) {
  for (int layer = 0; layer < s.net.layer_count; ++layer) {
    if (s.phases.wanted == StateWanted::kError) {
      add_phases<A>(s, c, layer);
      continue;
    }
    const StateLayer& own = s.net.layers[layer];
    const float* from =
        (s.tangent() ? c.r[c.current[layer % 2]] + s.stride : c.u[c.taken % 3]) + s.placed[layer].column;
    for (int64_t i = 0; i < c.rows; i += s.tangent() ? 2 : 1)
      std::memcpy(own.result + c.at[i].outer * own.units, from + i * s.stride, own.units * sizeof(float));
  }
  for (int64_t i = 0; i < c.rows; i += i < c.real ? 1 : 2) {
    int64_t& steps = s.report.steps[c.at[i].item];
    steps = smaller(steps, c.taken);
  }
}

// Weights and drive to where the steps read them.
inline void place(const Settlement& s, int threads) {
  for (int layer = 0; layer < s.net.layer_count; ++layer) {
    const PlacedLayer& p = s.placed[layer];
    const StateLayer& own = s.net.layers[layer];
    int64_t row = 0;
    for (const StateEdge* e = s.net.edges; e < s.net.edges + s.net.edge_count; ++e) {
      if (e->target != layer) continue;
      const int64_t depth = s.net.layers[e->source].units;
      pack_panels(e->weight, own.units, 1, depth, own.units, row, p.depth, p.panels, threads);
      row += depth;
    }
    const StateReadout& readout = s.net.readout;
    if (layer == s.last() && s.by_readout()) {
      pack_panels(readout.weight, 1, readout.classes, readout.classes, own.units, row, p.depth, p.panels, threads);
      pack_panels(readout.weight, readout.classes, 1, own.units, readout.classes, 0, own.units, s.readout, threads);
    }
    for (int64_t i = 0; i < s.phases.samples; ++i) {
      float* to = s.drive + i * s.stride + p.column;
      std::memset(to, 0, rounded(own.units, kApart) * sizeof(float));
      if (own.drive) std::memcpy(to, own.drive + i * own.units, own.units * sizeof(float));
    }
  }
}

}  // namespace lgk::cpu::LGK_ISA
