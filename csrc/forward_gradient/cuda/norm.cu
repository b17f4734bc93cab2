// Layers with a tangent: layer norm, its derivative, noise, residual and ReLU in one kernel, which computes the
// gradient for an activity's noise too: LN' is its own transpose.
//
// z is (outer, channels, inner) and the norm runs over the channels. Where inner is 1, some lanes of a warp share a
// row, four channels each at a time. Else threads side by side own four rows each, and those of one column of the block
// share their channels. Rows are walked over three times, for the sums depend on each other; what is read again lies in
// the cache.
#include "common/cuda/formula.h"
#include "forward_gradient/cuda/four.h"

namespace lgk::cuda {
namespace {

// -- noise ----------------------------------------------------------------------------------------------------------

template <typename T>
LGK_DEVICE T pick(const T (&values)[4], int index) {
  return index < 2 ? (index == 0 ? values[0] : values[1]) : (index == 2 ? values[2] : values[3]);
}

LGK_DEVICE void four_of_law(const Formula& f, const RandomState& s, uint32_t row, int64_t block, Four& value) {
  four_values(f.law, random_words(s, row, static_cast<uint32_t>(block)), f.range, value);
}

// Entries [column, column + 4) of the matrix's row.
LGK_DEVICE void law_entries(const Formula& f, const RandomState& s, uint32_t row, int64_t column, Four& value) {
  if (f.law == kUniform || f.law == kNormal) {
    four_of_law(f, s, row, column / 4, value);
    const int skip = static_cast<int>(column & 3);
    if (skip == 0) return;
    Four next, whole;
    four_of_law(f, s, row, column / 4 + 1, next);
#pragma unroll
    for (int i = 0; i < 4; ++i) whole[i] = i + skip < 4 ? pick(value, i + skip) : pick(next, i + skip - 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = whole[i];
    return;
  }
  const int per_call = f.law == kUniform8 ? 16 : 128;
  Words words{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = column + i;
    const int index = static_cast<int>(place % per_call);
    if (i == 0 || index == 0) words = random_words(s, row, static_cast<uint32_t>(place / per_call));
    if (f.law == kUniform8) {
      value[i] = uniform8_value(pick(words.w, index / 4) >> (8 * (index % 4)) & 255u, f.range);
    } else {
      value[i] = pick(words.w, index / 32) >> (index % 32) & 1u ? -f.range.scale : f.range.scale;
    }
  }
}

// -- what a thread does with four elements ----------------------------------------------------------------------------

struct Work {
  Layer layer;
  Fours z, moved, other, values;  // `other`: the residual, or the activation with a coefficient
  const float* coefficient;
  Formula law;
  Fours out, out_tangent;

  LGK_DEVICE bool linear() const { return coefficient != nullptr || moved.data != nullptr; }
  LGK_DEVICE bool noisy() const { return values.data != nullptr || law.value == kRandom; }
};

// Four elements: where they lie, the sample and the place in it, how many there are.
struct Element {
  int64_t at;
  int64_t place;
  uint32_t sample;
  int count;
};

// The noise, rounded by itself: added to something else it is what a tensor of noise holds.
LGK_DEVICE void noise_of(const Work& w, const RandomState& state, const Element& e, Four& value) {
  if (w.values.data != nullptr) {
    read_four(w.values, e.at, e.count, value);
  } else {
    law_entries(w.law, state, e.sample, e.place, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = __uint_as_float(not_hoisted(__float_as_uint(value[i])));
  }
}

// What LN' takes: the tangent of z, or coefficient noise 1[activation > 0]; 0 beyond `count`.
LGK_DEVICE void operand(const Work& w, const RandomState& state, const Element& e, const Four& coefficient, Four& v) {
  if (w.coefficient == nullptr) {
    read_four(w.moved, e.at, e.count, v);
    return;
  }
  Four activation;
  noise_of(w, state, e, v);
  if (w.layer.relu) read_four(w.other, e.at, e.count, activation);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] *= coefficient[i];
    if (w.layer.relu) v[i] *= activation[i] > 0.0f ? 1.0f : 0.0f;
    if (i >= e.count) v[i] = 0.0f;
  }
}

// Mean and rounding of a row, and of what moves it: LN'(z; v) = r (v - mean_v - centred along).
struct Row {
  float mean, r, mean_v, along;
};

LGK_DEVICE Row row_of(const Work& w, float mean, float square, float sum_v, float product) {
  const float size = static_cast<float>(w.layer.channels);
  const float r = 1.0f / sqrtf(square / size + w.layer.eps);
  return Row{mean, r, sum_v / size, product / size * (r * r)};
}

// Writes four elements; v: the operand, where there is one. A NaN passes the ReLU.
LGK_DEVICE void finish(const Work& w, const RandomState& state, const Element& e, const Row (&row)[4], const Four& z,
                       const Four& v) {
  Four y, moved = {0.0f, 0.0f, 0.0f, 0.0f}, noise, residual;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float centred = z[i] - row[i].mean;
    y[i] = centred * row[i].r;
    if (w.linear()) moved[i] = (v[i] - row[i].mean_v - centred * row[i].along) * row[i].r;
  }
  if (w.coefficient != nullptr) {
    write_four(w.out, e.at, e.count, moved);
    return;
  }
  if (w.other.data != nullptr) {
    read_four(w.other, e.at, e.count, residual);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += residual[i];
  }
  if (w.out_tangent.data != nullptr) {
    if (w.noisy()) {
      noise_of(w, state, e, noise);
#pragma unroll
      for (int i = 0; i < 4; ++i) moved[i] += noise[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (w.layer.relu) moved[i] *= y[i] > 0.0f ? 1.0f : 0.0f;
    write_four(w.out_tangent, e.at, e.count, moved);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (w.layer.relu && y[i] < 0.0f) y[i] = 0.0f;
  write_four(w.out, e.at, e.count, y);
}

// -- kernels --------------------------------------------------------------------------------------------------------

// inner = 1. Block (lanes, rows).
__global__ void __launch_bounds__(kThreads) norm_rows(Work w) {
  const int lanes = blockDim.x, channels = w.layer.channels, step = 4 * lanes;
  const int64_t own = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, row = min(own, w.layer.outer - 1);
  const int64_t first = row * channels, place = row % w.layer.per_sample * channels;
  const uint32_t sample = static_cast<uint32_t>(row / w.layer.per_sample);
  const int run = channels / w.layer.runs;
  const bool held = channels <= step;  // all of it in registers
  const RandomState state = random_state(w.law);
  const auto element = [&](int c) { return Element{first + c, place + c, sample, channels - c}; };
  const auto operand_at = [&](int c, Four& v) {
    Four coefficient = {0.0f, 0.0f, 0.0f, 0.0f};
    if (w.coefficient != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (c + i < channels) coefficient[i] = w.coefficient[row * w.layer.runs + (c + i) / run];
    }
    operand(w, state, element(c), coefficient, v);
  };
  Four z = {0.0f, 0.0f, 0.0f, 0.0f}, v = {0.0f, 0.0f, 0.0f, 0.0f};
  float sum = 0.0f, square = 0.0f, sum_v = 0.0f, product = 0.0f;
  for (int c = 4 * threadIdx.x; c < channels; c += step) {
    read_four(w.z, first + c, channels - c, z);
    sum += z[0] + z[1] + z[2] + z[3];
  }
  const float mean = lanes_sum(sum, lanes) / static_cast<float>(channels);
  for (int c = 4 * threadIdx.x; c < channels; c += step) {
    if (!held) read_four(w.z, first + c, channels - c, z);
    if (w.linear()) operand_at(c, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i >= channels) continue;
      const float centred = z[i] - mean;
      square += centred * centred;
      sum_v += v[i];
      product += centred * v[i];
    }
  }
  square = lanes_sum(square, lanes);
  const Row one = row_of(w, mean, square, lanes_sum(sum_v, lanes), lanes_sum(product, lanes));
  const Row same[4] = {one, one, one, one};
  if (own != row) return;
  for (int c = 4 * threadIdx.x; c < channels; c += step) {
    if (!held) read_four(w.z, first + c, channels - c, z);
    if (!held && w.linear()) operand_at(c, v);
    finish(w, state, element(c), same, z, v);
  }
}

// Sums of four rows over the threads of a column of the block, in their order. `shared`: blockDim.y * blockDim.x * 4.
LGK_DEVICE void column_sums(Four& value, float* shared) {
  const int width = 4 * blockDim.x, slot = 4 * threadIdx.x;
  __syncthreads();  // what the last call left has been read
#pragma unroll
  for (int i = 0; i < 4; ++i) shared[threadIdx.y * width + slot + i] = value[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = 0.0f;
  for (int y = 0; y < static_cast<int>(blockDim.y); ++y)
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] += shared[y * width + slot + i];
}

// Block (lanes, kThreads / lanes) on 4 * lanes rows that lie side by side; `tiles` of them an outer place.
__global__ void __launch_bounds__(kThreads) norm_columns(Work w, int tiles) {
  LGK_DYNAMIC_SHARED(float, shared);
  const int channels = w.layer.channels, run = channels / w.layer.runs;
  const int64_t inner = w.layer.inner, outer = blockIdx.x / tiles;
  const int64_t column = (int64_t{blockIdx.x % tiles} * blockDim.x + threadIdx.x) * 4;
  const int count = static_cast<int>(max(min(inner - column, int64_t{4}), int64_t{0}));
  const int64_t first = outer * channels * inner + column;
  const int64_t place = outer % w.layer.per_sample * channels * inner + column;
  const uint32_t sample = static_cast<uint32_t>(outer / w.layer.per_sample);
  const int begin = count > 0 ? threadIdx.y : channels;  // beyond the rows a thread only takes part in the sums
  const RandomState state = random_state(w.law);
  const Fours coefficients{w.coefficient, kFloat32,
                           inner % 4 == 0 && reinterpret_cast<uintptr_t>(w.coefficient) % 16 == 0};
  const auto element = [&](int c) { return Element{first + c * inner, place + c * inner, sample, count}; };
  const auto operand_at = [&](int c, Four& v) {
    Four coefficient = {0.0f, 0.0f, 0.0f, 0.0f};
    if (w.coefficient != nullptr)
      read_four(coefficients, (outer * w.layer.runs + c / run) * inner + column, count, coefficient);
    operand(w, state, element(c), coefficient, v);
  };
  Four z, v = {0.0f, 0.0f, 0.0f, 0.0f};
  Four mean = {0.0f, 0.0f, 0.0f, 0.0f}, square = {0.0f, 0.0f, 0.0f, 0.0f}, sum_v = {0.0f, 0.0f, 0.0f, 0.0f},
       product = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int c = begin; c < channels; c += blockDim.y) {
    read_four(w.z, first + c * inner, count, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[i] += z[i];
  }
  column_sums(mean, shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) mean[i] /= static_cast<float>(channels);
  for (int c = begin; c < channels; c += blockDim.y) {
    read_four(w.z, first + c * inner, count, z);
    if (w.linear()) operand_at(c, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float centred = z[i] - mean[i];
      square[i] += centred * centred;
      sum_v[i] += v[i];
      product[i] += centred * v[i];
    }
  }
  column_sums(square, shared);
  if (w.linear()) {  // the same for the whole grid
    column_sums(sum_v, shared);
    column_sums(product, shared);
  }
  Row row[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) row[i] = row_of(w, mean[i], square[i], sum_v[i], product[i]);
  for (int c = begin; c < channels; c += blockDim.y) {
    read_four(w.z, first + c * inner, count, z);
    if (w.linear()) operand_at(c, v);
    finish(w, state, element(c), row, z, v);
  }
}

int launch_norm(const Work& w, void* stream) {
  const Layer& l = w.layer;
  if (l.inner == 1) {
    const RowBlock block = row_block(l.outer, l.channels, kThreads);
    const int64_t blocks = ceil_div<int64_t>(l.outer, block.rows);
    if (blocks >= INT32_MAX) return kInvalidArgument;
    LGK_LAUNCH(norm_rows, dim3(blocks), dim3(block.lanes, block.rows), 0, stream, w);
    return launch_status();
  }
  const int lanes = power_of_two_from(ceil_div<int64_t>(l.inner, 4), 32);
  const int64_t tiles = ceil_div<int64_t>(l.inner, 4 * lanes);
  if (l.outer * tiles >= INT32_MAX) return kInvalidArgument;
  LGK_LAUNCH(norm_columns, dim3(l.outer * tiles), dim3(lanes, kThreads / lanes), kThreads * sizeof(Four), stream, w,
             static_cast<int>(tiles));
  return launch_status();
}

}  // namespace

int forward_gradient_dual_norm(const Layer& layer, const Array& z, const Array& z_tangent, const Array& residual,
                               const Array& values, const Formula& law, void* out, void* out_tangent, void* stream) {
  const int64_t size = layer.inner == 1 ? layer.channels : layer.inner;
  return launch_norm(Work{layer, fours(z, size), fours(z_tangent, size), fours(residual, size), fours(values, size),
                          nullptr, law, fours(Array{out, z.dtype}, size), fours(Array{out_tangent, z.dtype}, size)},
                     stream);
}

int forward_gradient_activity_grad(const Layer& layer, const Array& z, const Array& activity, const float* coefficient,
                                   const Array& values, const Formula& law, void* out, void* stream) {
  const int64_t size = layer.inner == 1 ? layer.channels : layer.inner;
  return launch_norm(Work{layer, fours(z, size), Fours{}, fours(activity, size), fours(values, size), coefficient, law,
                          fours(Array{out, z.dtype}, size), Fours{}},
                     stream);
}

}  // namespace lgk::cuda
