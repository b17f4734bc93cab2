#pragma once
#include <vector>

#include "common/cuda/launch.h"

namespace lgk::cuda {

int device_status(int device);     // 0, or the error that kernels of this build meet on the device
std::vector<int> architectures();  // this build's, times ten: 800, 860; none under the CPU executor

}  // namespace lgk::cuda
