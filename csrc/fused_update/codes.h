// The 256 values of states of 8 bits (lgkernels/ops/fused_update/blocks.py), and how their codes are found by
// arithmetic.
//
// Let q be a value in [0, 1], and P = 2^i (signed) or 2^(i+1) (unsigned) the parts of decade i = 0..6. The function
// F(q) = P (1 + (10^(6-i) q - 0.1) / 0.9) is continuous and concave over all decades, so it is the least of their seven
// lines. Within a decade the boundaries between the nearest codes lie where F is whole, and trunc(F) is the code (plus
// one, unsigned). Between decades, where P is doubled, the nearest code changes at F = P + 0.2 instead, and before the
// last value, 1, at F = 2^7 (2^8) - 0.25. The line of i = 0 is bent so that this holds between 0 and the first value.
#pragma once
#include "common/dtypes.h"

namespace lgk {

constexpr int kCodeBlock = 256;  // entries that share an absmax
constexpr int kDecades = 7;
constexpr int kZeroCode = 127;  // of the signed values

struct CodeLines {
  float at_zero[kDecades], slope[kDecades];
  float last;  // F from which on the code is that of 1
};

constexpr CodeLines code_lines(bool is_signed) {
  CodeLines lines{};
  double power = 1e6, parts = is_signed ? 1 : 2;  // 10^(6-i)
  for (int i = 0; i < kDecades; ++i, power /= 10, parts *= 2) {
    lines.at_zero[i] = static_cast<float>(parts * 8 / 9);
    lines.slope[i] = static_cast<float>(parts * power / 0.9);
  }
  const double bend = is_signed ? 0.275e-6 : 0.1625e-6, next = is_signed ? 1e-6 : 0.55e-6;
  const double slope = 0.8 / (next - bend), first = is_signed ? 1.2 : 2.2;
  lines.slope[0] = static_cast<float>(slope);
  lines.at_zero[0] = static_cast<float>(first - slope * bend);
  lines.last = is_signed ? 127.75f : 255.75f;
  return lines;
}

struct CodeValues {
  float of[256];
};

constexpr CodeValues code_values(bool is_signed) {
  CodeValues values{};
  const int zero = is_signed ? kZeroCode : 0;
  double power = 1e-6;
  int parts = is_signed ? 1 : 2, next = zero + 1;
  for (int i = 0; i < kDecades; ++i, power *= 10, parts *= 2)
    for (int d = 0; d < parts; ++d, ++next) {
      const double value = power * (0.1 + 0.9 * (d + 0.5) / parts);
      values.of[next] = static_cast<float>(value);
      if (is_signed) values.of[2 * zero - next] = static_cast<float>(-value);
    }
  values.of[255] = 1.f;
  return values;
}

}  // namespace lgk
