// Static work sharing and scratch memory of the CPU kernels.
#pragma once
#include <cstdint>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kSmallWork = 32768;  // elements below which waking a second thread costs more than it saves

// body(begin, end, thread) over [0, items); no parallel region for one thread or little work.
template <class Body>
inline void parallel(int64_t items, int64_t work, int threads, const Body& body) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1 || work < kSmallWork) {
    if (items > 0) body(int64_t{0}, items, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    const int count = omp_get_num_threads(), thread = omp_get_thread_num();
    body(items * thread / count, items * (thread + 1) / count, thread);
  }
#else
  body(int64_t{0}, items, 0);
#endif
}

// `each` floats for every thread, each part on its own cache lines.
class Scratch {
 public:
  Scratch(int64_t each, int threads) : each_((each + 31) / 16 * 16) {
    data_ = static_cast<float*>(std::aligned_alloc(64, (each_ * (threads > 0 ? threads : 1) + 16) * sizeof(float)));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  float* of(int thread) const { return data_ + each_ * thread; }

 private:
  int64_t each_;
  float* data_;
};

}  // namespace lgk::cpu::LGK_ISA
