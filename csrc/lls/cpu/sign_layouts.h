// The square basis in the orders that the kernels read.
#pragma once
#include <cstdint>

namespace lgk::cpu {

// (rows, ceil(dim / 32)) packed signs, bit j % 32 of word j / 32 set where negative, in the two orders that the
// products read: out[w][row] = signs[row][w], rows padded to 16, then the transposed bits (ceil(rows / 32), dim).
int64_t sign_layouts_size(int64_t rows, int64_t dim);
void sign_layouts(const uint32_t* signs, int64_t rows, int64_t dim, uint32_t* out);

}  // namespace lgk::cpu
