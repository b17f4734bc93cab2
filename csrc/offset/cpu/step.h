// The step of the BP-modified local loss over all tensors in one parallel region: 24 bytes a parameter (22 with
// bfloat16 offsets), each element read and written once.
#pragma once
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "offset/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kSplit = 1024;  // threads part at multiples of it within a tensor: whole vectors and cache lines

template <bool MOMENTUM, bool OFFSET, class T>
LGK_INLINE void offset_vector(const OffsetTensor& t, int64_t i, int64_t n, const OffsetOptions& step) {
  float *w = t.param + i, *v = t.momentum_buffer + i;
  const vf weight = load_some(w, n);
  vf g = load_some(t.grad + i, n) * step.local_scale + weight * step.weight_decay;
  if (OFFSET) g += load_some(static_cast<const T*>(t.offset) + i, n) * step.offset_scale;
  if (MOMENTUM) {
    g += load_some(v, n) * step.momentum;
    store_some(v, g, n);
  }
  store_some(w, weight - g * step.lr, n);
}

template <bool MOMENTUM, bool OFFSET, class T>
inline void offset_range(OffsetTensor t, int64_t begin, int64_t end, OffsetOptions step) {
  int64_t i = begin;
  for (; i + 4 * V <= end; i += 4 * V)
    for (int k = 0; k < 4; ++k) offset_vector<MOMENTUM, OFFSET, T>(t, i + k * V, V, step);
  for (; i < end; i += V) offset_vector<MOMENTUM, OFFSET, T>(t, i, smaller(end - i, V), step);
}

inline int offset_tensor(const OffsetTensor& t, int64_t begin, int64_t end, const OffsetOptions& step) {
  if (!t.offset) {
    t.momentum_buffer ? offset_range<true, false, float>(t, begin, end, step)
                      : offset_range<false, false, float>(t, begin, end, step);
    return 0;
  }
  return for_dtype(static_cast<int>(t.offset_dtype), [&](auto type) {
    using T = decltype(type);
    t.momentum_buffer ? offset_range<true, true, T>(t, begin, end, step)
                      : offset_range<false, true, T>(t, begin, end, step);
    return 0;
  });
}

inline int offset_sgd(const OffsetOptions& step, const OffsetTensor* tensors, int64_t count, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].offset && (tensors[i].offset_dtype < kFloat32 || tensors[i].offset_dtype > kFloat16)) return 2;
    total += tensors[i].size;
  }
  // A thread takes an even share of all elements laid end to end, wherever the tensors' borders are.
  parallel(total, total, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = 0, start = 0; i < count && start < end; start += tensors[i++].size) {
      const int64_t size = tensors[i].size;
      const auto within = [&](int64_t at) {
        return at <= start ? 0 : smaller(size, (at - start + kSplit - 1) / kSplit * kSplit);
      };
      const int64_t from = within(begin), to = within(end);
      if (from < to) offset_tensor(tensors[i], from, to, step);
    }
  });
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA
