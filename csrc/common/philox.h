// Philox4x32-10 and the laws of lgkernels/random.py, for CPU and CUDA code (law version 2).
//
//   counter = (col / v, row, step, stream), key = (seed low, seed high)
//   v = 4 uniform and normal, 16 uniform8, 128 sign; values in word-then-byte-then-bit order, low first.
//
// Words, uniform, uniform8 and sign are bit-equal everywhere, also where the compiler contracts into fused
// multiply-adds: every product that meets a sum is exact, or fused on purpose.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtypes.h"

namespace lgk {

enum Law : int { kUniform = 0, kNormal = 1, kUniform8 = 2, kSign = 3 };

template <int LAW>
struct ValuesPerCall {
  static constexpr int value = LAW == kUniform8 ? 16 : LAW == kSign ? 128 : 4;
};

struct Words {
  uint32_t w[4];
};

LGK_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key_low;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key_high;
    c3 = static_cast<uint32_t>(p0);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The words of columns [block * v, (block + 1) * v) of `row`; state = (seed, stream, step).
LGK_HD Words feedback_words(const int64_t* state, uint32_t row, uint32_t block) {
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return philox(block, row, static_cast<uint32_t>(state[2]), static_cast<uint32_t>(state[1]),
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

LGK_HD float unit(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }  // exact

// low + (scale - low) * unit, rounded once
LGK_HD float affine(float unit_value, float span, float low) { return fmaf(unit_value, span, low); }

// How a law maps to values: scale as given, span = float(double(scale) - double(low)).
struct Range {
  float scale, span, low;
  bool has_low;
};

LGK_HD Range signed_range(double scale) { return Range{static_cast<float>(scale), 0.0f, 0.0f, false}; }
LGK_HD Range range_from(double low, double scale) {
  return Range{static_cast<float>(scale), static_cast<float>(scale - low), static_cast<float>(low), true};
}

LGK_HD float uniform_value(uint32_t word, const Range& r) {
  const float u = unit(word);
  return r.has_low ? affine(u, r.span, r.low) : (2.0f * u - 1.0f) * r.scale;
}

LGK_HD float uniform8_value(uint32_t byte, const Range& r) {
  const float b = static_cast<float>(byte);
  return r.has_low ? affine((b + 0.5f) * 0x1p-8f, r.span, r.low) : ((2.0f * b - 255.0f) * 0x1p-8f) * r.scale;
}

LGK_HD void normal_pair(uint32_t word0, uint32_t word1, float scale, float* out) {
  const float radius = sqrtf(-2.0f * logf(unit(word0)));
  const float angle = unit(word1) * 6.28318530717958647692f;
  out[0] = (radius * cosf(angle)) * scale;
  out[1] = (radius * sinf(angle)) * scale;
}

// All v values of one call.
template <int LAW>
LGK_HD void law_values(const Words& words, const Range& r, float* out) {
  if constexpr (LAW == kNormal) {
    normal_pair(words.w[0], words.w[1], r.scale, out);
    normal_pair(words.w[2], words.w[3], r.scale, out + 2);
  } else {
    for (int i = 0; i < ValuesPerCall<LAW>::value; ++i) {
      if constexpr (LAW == kUniform) out[i] = uniform_value(words.w[i], r);
      if constexpr (LAW == kUniform8) out[i] = uniform8_value((words.w[i >> 2] >> (8 * (i & 3))) & 255u, r);
      if constexpr (LAW == kSign) out[i] = (words.w[i >> 5] >> (i & 31)) & 1u ? -r.scale : r.scale;
    }
  }
}

}  // namespace lgk
