// Element types of the kernels' tensors, as passed from Python.
#pragma once
#include <cstdint>

namespace lgk {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline const char* status_message(int status) {
  switch (status) {
    case 0: return "ok";
    case 1: return "out of memory";
    case 2: return "unknown dtype code";
    default: return "unknown status";
  }
}

}  // namespace lgk
