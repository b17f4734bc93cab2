#include "lls/cpu/bins.h"

namespace lgk::cpu {

Bins::Bins(int64_t size, int64_t pool) : first(pool), last(pool), inverse(pool) {
  std::vector<int64_t> start(pool), end(pool);
  for (int64_t i = 0; i < pool; ++i) {
    start[i] = i * size / pool;
    end[i] = ((i + 1) * size + pool - 1) / pool;
    inverse[i] = 1.f / static_cast<float>(end[i] - start[i]);
  }
  for (int64_t i = 0, j = 0; i < pool || j < pool;) {  // merge the two rising sequences
    const int64_t next = i < pool && start[i] <= end[j] ? start[i++] : end[j++];
    if (bound.empty() || bound.back() != next) bound.push_back(next);
  }
  const int64_t segments = static_cast<int64_t>(bound.size()) - 1;
  low.resize(segments);
  high.resize(segments);
  for (int64_t i = 0, s = 0, e = 0; i < pool; ++i) {
    while (bound[s] < start[i]) ++s;
    while (bound[e] < end[i]) ++e;
    first[i] = s;
    last[i] = e;
  }
  for (int64_t s = 0, lo = 0, hi = 0; s < segments; ++s) {
    while (hi < pool && first[hi] <= s) ++hi;
    while (last[lo] <= s) ++lo;
    low[s] = lo;
    high[s] = hi;
  }
  axis = {size, pool, segments, bound.data(), first.data(), last.data(), low.data(), high.data(), inverse.data()};
}

}  // namespace lgk::cpu
