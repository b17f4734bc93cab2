// Runs CUDA C++ kernels on the CPU: each block's threads are fibers, switched at barriers and warp collectives.
//
// What it checks that a GPU does not: between two barriers the warps run one after another, each through all of its
// warp collectives, and between two collectives so do the lanes of a warp, both in an order that the caller sets
// (ascending, descending, shuffled), so a missing barrier changes the result; a barrier that not all threads reach, or
// that they reach at different lines, ends the launch with a report; dynamic shared memory is a heap block of the exact
// size, refilled with NaN for each block, so that AddressSanitizer sees an overflow and a read of what was never
// written shows in the result.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LGK_ASAN 1
#else
#define LGK_ASAN 0
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr size_t volume() const { return size_t{x} * y * z; }
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lgk::simt {

enum class Order { kAscending, kDescending, kShuffled };
enum class Wait { kReady, kDone, kBarrier, kSyncWarp, kShuffle, kShuffleDown, kShuffleXor, kBallot, kAny, kAll };

inline const char* name(Wait wait) {
  static const char* const names[] = {"ready",       "returned",         "__syncthreads",   "__syncwarp",
                                      "__shfl_sync", "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                      "__any_sync",  "__all_sync"};
  return names[static_cast<int>(wait)];
}

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 index;
  // What the thread waits for, and the operands of a warp collective.
  Wait wait = Wait::kReady;
  int line = 0;
  uint32_t mask = 0, value = 0, result = 0;
  int argument = 0;
};

class Executor {
 public:
  Order order = Order::kAscending;
  bool dry = false;                        // launches are checked and logged, nothing runs
  std::vector<std::array<size_t, 3>> log;  // blocks, threads of a block, bytes of dynamic shared memory

  static Executor& instance() {
    static Executor executor;
    return executor;
  }

  void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    if (block.volume() == 0 || block.volume() > 1024 || block.volume() % 32 != 0)
      throw std::runtime_error("a block has " + std::to_string(block.volume()) + " threads: whole warps, at most 1024");
    if (grid.volume() == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
      throw std::runtime_error("the grid is empty or too large");
    if (shared_bytes > 48 * 1024)
      throw std::runtime_error("more than 48 KiB of shared memory: a GPU gives it only to kernels that ask for it");
    log.push_back({grid.volume(), block.volume(), shared_bytes});
    if (dry) return;
    kernel_ = std::move(kernel);
    gridDim = grid;
    blockDim = block;
    std::vector<size_t> blocks(grid.volume());
    arrange(blocks);
    for (size_t b : blocks) {
      blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      std::vector<char> poisoned(shared_bytes, static_cast<char>(0xff));
      shared_ = poisoned.data();
      run_block(block);
    }
  }

  char* shared() const { return shared_; }

  uint32_t collective(Wait wait, uint32_t mask, uint32_t value, int argument, int line) {
    Fiber& fiber = *current_;
    fiber.wait = wait;
    fiber.mask = mask;
    fiber.value = value;
    fiber.argument = argument;
    fiber.line = line;
    switch_to_scheduler(fiber, &fiber.fake_stack);
    return fiber.result;
  }

 private:
  static constexpr size_t kStack = LGK_ASAN ? 256 * 1024 : 64 * 1024;

  void arrange(std::vector<size_t>& indices) {
    std::iota(indices.begin(), indices.end(), size_t{0});
    if (order == Order::kDescending) std::reverse(indices.begin(), indices.end());
    if (order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random_);
  }

  void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      fiber.stack = static_cast<char*>(memory);
    }
#if LGK_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    make_context(&fiber.context, fiber.stack, kStack, &Executor::enter);
    fiber.wait = Wait::kReady;
  }

  static void enter() {
    Executor& self = instance();
#if LGK_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_size_);
#endif
    self.kernel_();
    Fiber& fiber = *self.current_;
    fiber.wait = Wait::kDone;
    self.switch_to_scheduler(fiber, nullptr);  // never resumed
  }

  void switch_to_scheduler(Fiber& fiber, [[maybe_unused]] void** save_fake_stack) {
#if LGK_ASAN
    __sanitizer_start_switch_fiber(save_fake_stack, scheduler_stack_, scheduler_stack_size_);
#endif
    switch_context(&fiber.context, &scheduler_);
#if LGK_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.index;
#if LGK_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
    switch_context(&scheduler_, &fiber.context);
#if LGK_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void run_block(dim3 block) {
    const size_t threads = block.volume();
    if (fibers_.size() < threads) fibers_.resize(threads);
    for (size_t t = 0; t < threads; ++t) {
      prepare(fibers_[t]);
      fibers_[t].index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
    }
    std::vector<size_t> warps(threads / 32);
    do {
      arrange(warps);
      for (size_t warp : warps) run_warp(&fibers_[32 * warp]);
    } while (release_barrier(threads));
    for (size_t t = 0; t < threads; ++t)
      if (fibers_[t].wait != Wait::kDone) throw std::runtime_error(deadlock_report(threads));
  }

  // As far as the barriers allow: until no lane is ready, so that warps drift apart as much as they ever can on a GPU.
  void run_warp(Fiber* warp) {
    std::vector<size_t> lanes(32);
    do {
      arrange(lanes);
      for (size_t lane : lanes)
        if (warp[lane].wait == Wait::kReady) resume(warp[lane]);
    } while (release_collectives(warp));
  }

  bool release_barrier(size_t threads) {
    for (size_t t = 0; t < threads; ++t)
      if (fibers_[t].wait != Wait::kBarrier || fibers_[t].line != fibers_[0].line) return false;
    for (size_t t = 0; t < threads; ++t) fibers_[t].wait = Wait::kReady;
    return true;
  }

  // Completes every collective that all lanes of its mask have reached at the same line.
  static bool release_collectives(Fiber* lanes) {
    bool released = false;
    for (int lane = 0; lane < 32; ++lane) {
      const Fiber& first = lanes[lane];
      if (first.wait < Wait::kSyncWarp || !(first.mask >> lane & 1)) continue;
      bool complete = true;
      for (int other = 0; other < 32; ++other)
        if (first.mask >> other & 1)
          complete &=
              lanes[other].wait == first.wait && lanes[other].mask == first.mask && lanes[other].line == first.line;
      if (!complete) continue;
      perform(lanes, first.wait, first.mask);
      released = true;
    }
    return released;
  }

  static void perform(Fiber* lanes, Wait wait, uint32_t mask) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) votes |= static_cast<uint32_t>(lanes[lane].value != 0) << lane;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = lanes[lane];
      if (wait == Wait::kShuffle || wait == Wait::kShuffleDown || wait == Wait::kShuffleXor) {
        int source = wait == Wait::kShuffle       ? fiber.argument & 31
                     : wait == Wait::kShuffleDown ? lane + fiber.argument
                                                  : lane ^ fiber.argument;
        if (source > 31) source = lane;
        if (!(mask >> source & 1)) throw std::runtime_error("a shuffle reads a lane outside its mask");
        fiber.result = lanes[source].value;
      } else {
        fiber.result = wait == Wait::kBallot ? votes : wait == Wait::kAny ? votes != 0 : votes == mask;
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) lanes[lane].wait = Wait::kReady;
  }

  std::string deadlock_report(size_t threads) const {
    std::map<std::string, int> where;
    for (size_t t = 0; t < threads; ++t) {
      const Fiber& fiber = fibers_[t];
      std::string place = name(fiber.wait);
      if (fiber.wait != Wait::kDone) place += " at line " + std::to_string(fiber.line);
      ++where[place];
    }
    std::string report = "deadlock in block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                         std::to_string(blockIdx.z) + "):";
    for (const auto& [place, count] : where) report += " " + std::to_string(count) + " threads " + place + ";";
    return report;
  }

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::mt19937 random_{1};
  Context scheduler_;
  Fiber* current_ = nullptr;
  char* shared_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

template <typename T>
T exchange(Wait wait, uint32_t mask, T value, int argument, int line) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = Executor::instance().collective(wait, mask, bits, argument, line);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t vote(Wait wait, uint32_t mask, bool predicate, int line) {
  return Executor::instance().collective(wait, mask, predicate, 0, line);
}

}  // namespace lgk::simt

namespace lgk::cuda {
inline int launch_status() { return 0; }
inline const char* status_string(int status) { return status == 1 ? "invalid argument" : "unknown"; }
inline int runtime_version() { return 0; }
inline int driver_version() { return 0; }
}  // namespace lgk::cuda

#define LGK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                      \
   lgk::simt::Executor::instance().launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define LGK_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(lgk::simt::Executor::instance().shared())
#define LGK_GRID_CONSTANT

#define LGK_SIMT_EXCHANGE(wait, mask, value, argument) \
  lgk::simt::exchange(lgk::simt::Wait::wait, mask, value, argument, __LINE__)
#define LGK_SIMT_VOTE(wait, mask, predicate) lgk::simt::vote(lgk::simt::Wait::wait, mask, predicate, __LINE__)
#define __syncthreads() static_cast<void>(LGK_SIMT_VOTE(kBarrier, 0, false))
#define __syncwarp(...) static_cast<void>(LGK_SIMT_VOTE(kSyncWarp, 0xffffffffu, false))
#define __shfl_sync(mask, value, lane) LGK_SIMT_EXCHANGE(kShuffle, mask, value, lane)
#define __shfl_down_sync(mask, value, delta) LGK_SIMT_EXCHANGE(kShuffleDown, mask, value, delta)
#define __shfl_xor_sync(mask, value, bits) LGK_SIMT_EXCHANGE(kShuffleXor, mask, value, bits)
#define __ballot_sync(mask, predicate) LGK_SIMT_VOTE(kBallot, mask, predicate)
#define __any_sync(mask, predicate) static_cast<int>(LGK_SIMT_VOTE(kAny, mask, predicate))
#define __all_sync(mask, predicate) static_cast<int>(LGK_SIMT_VOTE(kAll, mask, predicate))
