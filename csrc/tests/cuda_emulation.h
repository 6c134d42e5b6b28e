// Runs the kernels of csrc/cuda/farthest_point.cu on the CPU, so that their indexing and their bits
// can be tested where there is no GPU: each CUDA thread is a fiber, blocks run one after another,
// and a fiber gives way at every barrier and warp operation. Not emulated: time, memory ordering,
// cp.async that is still under way. Define SLAP_CUDA_EMULATION and compile the .cu file as C++.
#ifndef SLAP_TESTS_CUDA_EMULATION_H_
#define SLAP_TESTS_CUDA_EMULATION_H_

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline float __double2float_rd(double value) {
  const float near = static_cast<float>(value);
  return near > value ? std::nextafter(near, -INFINITY) : near;
}
inline float __double2float_ru(double value) {
  const float near = static_cast<float>(value);
  return near < value ? std::nextafter(near, INFINITY) : near;
}

namespace emulation {

constexpr size_t kStack = 64 * 1024;

// Switched by setjmp and longjmp: swapcontext costs a system call each time.
struct Fiber {
  ucontext_t start{};
  jmp_buf context;
  bool started = false;
  std::unique_ptr<char[]> stack;
  bool finished = false;
  bool waiting = false;
};

inline std::vector<Fiber> fibers(1024);  // never resized: a context holds pointers into itself
inline jmp_buf scheduler;
inline size_t current = 0;
inline const std::function<void()>* body = nullptr;
inline std::vector<float4> dynamic_shared;
inline dim3 thread_index, block_index, block_size, grid_size;

// Loads of 4 bytes, by lanes; and the sectors of 32 bytes that all lanes of a warp touch at once: an
// eighth of the loads where the lanes read one after another, as many where each is far from all.
inline int64_t loads = 0, sectors = 0;
inline std::vector<int> loads_of(1024);            // each thread's, in this block
inline std::set<std::array<uintptr_t, 3>> touched;  // warp, its how-manieth load, sector

template <typename T>
const T& Counted(const T& value) {
  ++loads;
  const auto number = static_cast<uintptr_t>(loads_of[current]++);
  sectors += touched.insert({current / 32, number, reinterpret_cast<uintptr_t>(&value) / 32}).second;
  return value;
}

inline void Enter() {
  (*body)();
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

// Back to the scheduler, until it comes round to this fiber again.
inline void GiveWay() {
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler, 1);
}

inline void Resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Waits until every unfinished thread of [begin, end) waits here too.
inline void Barrier(size_t begin, size_t end) {
  fibers[current].waiting = true;
  const auto all_here = [&] {
    for (size_t i = begin; i < end; ++i) {
      if (!fibers[i].finished && !fibers[i].waiting) return false;
    }
    return true;
  };
  const size_t self = current;
  long patience = 1000000;
  while (fibers[self].waiting) {
    if (all_here()) {
      for (size_t i = begin; i < end; ++i) fibers[i].waiting = false;
      return;
    }
    if (--patience == 0) {
      std::fprintf(stderr, "cuda_emulation: thread %zu waits for ever at a barrier\n", self);
      std::abort();
    }
    GiveWay();
  }
}

inline void RunBlock(const std::function<void()>& kernel) {
  const size_t threads = block_size.x;
  body = &kernel;
  touched.clear();
  loads_of.assign(loads_of.size(), 0);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.finished = fiber.waiting = fiber.started = false;
    if (fiber.start.uc_stack.ss_sp == nullptr) getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, Enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (size_t i = 0; i < threads; ++i) {
      if (fibers[i].finished) continue;
      running = true;
      current = i;
      thread_index.x = static_cast<unsigned>(i);
      Resume(fibers[i]);
    }
  }
}

inline void Launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  grid_size = grid;
  block_size = block;
  dynamic_shared.assign(shared / sizeof(float4) + 1, float4{NAN, NAN, NAN, NAN});
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      RunBlock(kernel);
    }
  }
}

inline size_t WarpBegin() { return current / 32 * 32; }
inline size_t WarpEnd() { return std::min<size_t>(WarpBegin() + 32, block_size.x); }

// Every lane's value, after all lanes of the warp have given theirs.
template <typename T, typename Use>
auto Exchange(T value, Use use) {
  static T values[1024];
  values[current] = value;
  Barrier(WarpBegin(), WarpEnd());
  const auto result = use(&values[WarpBegin()]);
  Barrier(WarpBegin(), WarpEnd());
  return result;
}

// mma.m16n8k16 of bfloat16, by a machine that is as imprecise as csrc/cuda/filter.cuh allows for:
// each of 17 addends may be cut at 2^-22 of the largest, and all errors lower the sum.
struct Fragments {
  unsigned a[4], b[2];
};
inline double Half(const unsigned* words, int index) {
  const unsigned bits = (words[index / 2] >> (index % 2 * 16)) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void MultiplyAdd(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const int lane = static_cast<int>(current % 32);
  Fragments own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  struct Four {
    float value[4];
  };
  const Four result = Exchange(own, [&](const Fragments* all) {
    Four out;
    for (int e = 0; e < 4; ++e) {
      double sum = acc[e], largest = std::fabs(acc[e]);
      for (int k = 0; k < 16; ++k) {
        const int word = k / 8 * 2 + e / 2;  // of A: rows 0 and 8, then columns 8 on
        const Fragments& row = all[lane / 4 * 4 + k % 8 / 2];
        const Fragments& column = all[(lane % 4 * 2 + e % 2) * 4 + k % 8 / 2];
        const double product = Half(&row.a[word], k % 2) * Half(&column.b[k / 8], k % 2);
        sum += product;
        largest = std::max(largest, std::fabs(product));
      }
      out.value[e] = __double2float_rd(sum - 17 * 0x1p-22 * largest);
    }
    return out;
  });
  std::memcpy(acc, result.value, sizeof result.value);
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size
#define SLAP_COUNTED(value) emulation::Counted(value)
#define SLAP_DYNAMIC_SHARED(type, name) type* name = emulation::dynamic_shared.data()
#define SLAP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulation::Launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })

inline void __syncthreads() { emulation::Barrier(0, emulation::block_size.x); }

inline void __syncwarp() { emulation::Barrier(emulation::WarpBegin(), emulation::WarpEnd()); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::Exchange(value, [=](const T* all) { return all[lane]; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = static_cast<int>(emulation::current % 32);
  return emulation::Exchange(value, [=](const T* all) { return all[lane ^ mask]; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = static_cast<int>(emulation::current % 32);
  return emulation::Exchange(value,
                             [=](const T* all) { return all[lane < step ? lane : lane - step]; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulation::Exchange(value, [](const unsigned* v) { return *std::max_element(v, v + 32); });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return emulation::Exchange(value, [](const unsigned* v) { return *std::min_element(v, v + 32); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::Exchange(value, [](const bool* v) {
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(v[i]) << i;
    return mask;
  });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <typename T>
T atomicSub(T* to, T value) {
  const T before = *to;
  *to -= value;
  return before;
}
template <typename T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = std::max(*to, value);
  return before;
}
template <typename T>
T atomicMin(T* to, T value) {
  const T before = *to;
  *to = std::min(*to, value);
  return before;
}

inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
enum {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaFuncAttributeMaxDynamicSharedMemorySize
};
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** to, size_t bytes) {
  *to = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, size_t) {
  return cudaSuccess;
}

#endif  // SLAP_TESTS_CUDA_EMULATION_H_
