// What all kernels share: the state on the device, keys, asynchronous copies, the exact chain.
#ifndef SLAP_CUDA_DEVICE_CUH_
#define SLAP_CUDA_DEVICE_CUH_

#include <stdint.h>
#include <string.h>

#ifndef SLAP_CUDA_EMULATION
#include <cuda_runtime.h>
#define SLAP_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define SLAP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SLAP_COUNTED(value) (value)  // the emulation counts what such a load touches
#else
#include "../tests/cuda_emulation.h"
#endif

namespace {

constexpr int kBlock = 128;         // points in a pool
constexpr int kDepth = 16;          // rows are padded to a multiple of so many dimensions
constexpr int kPitch = kDepth + 4;  // floats: 8 lanes that read 16 bytes each hit all 32 banks once
constexpr unsigned kAll = 0xffffffffu;

struct State {
  int32_t stratum;
  int32_t done;               // picks made
  int32_t pool;               // points in the pool
  int32_t count;              // picks of this round
  int32_t targets;            // points that can still change
  int32_t exact;              // 1: Shrink does this round; 0: Filter and Recheck do, if they can
  unsigned long long beyond;  // key of the best open point outside the pool
  int32_t rest;               // rounds that Filter sits out
  int32_t close;              // pairs of this round that Filter could not rule out
};

struct Arguments {
  int32_t n, k, g, m, first, across;
  int32_t stride;          // floats a row, a multiple of kDepth; padding is 0
  const float* rows;       // (n, stride)
  const int32_t* order;    // (n,) points sorted by stratum, then index
  const int32_t* begin;    // (k + 1,) where each stratum begins in `order`
  const int32_t* stratum;  // (n,)
  const int32_t* group;    // (n,), if g > 0
  int32_t* remaining;           // (g,) picks left
  int32_t* left;           // (k,) picks left
  State* state;
  int32_t* pool;     // (kBlock,) ascending
  float* pair;       // (kBlock, kBlock) squared distances inside the pool
  int32_t* fresh;    // (kBlock,) the round's picks
  int32_t* targets;  // (n,)
  float* squared;    // (n,); -1: picked
  // What the filter keeps of each point, if there is one (filter.cuh).
  int32_t half_stride;  // bfloat16 values a row, a multiple of kFilterDepth; 0: no filter
  uint16_t* halves;     // (n, half_stride) the centred points in bfloat16
  float* centre;        // (stride,)
  float* half_norm;     // (n,) half the squared norm of a row of `halves`, rounded down
  float* residual;      // (n,) how far that row is from its point, rounded up
  int2* close;          // (kCloseShare * n,) target and pick of the pairs to be recomputed
  int64_t* picks;       // (m,)
  float* pick_squared;  // (m,)
};

// Larger is picked first: the larger distance, then the lower index.
__device__ unsigned long long Key(unsigned bits, int index) {
  return static_cast<unsigned long long>(bits) << 32 | (kAll - static_cast<unsigned>(index));
}

__device__ bool IsOpen(const Arguments& a, int i) {
  return a.squared[i] >= 0.0f && (a.g == 0 || a.remaining[a.group[i]] > 0);
}

// A distance that is open to picks is >= 0, where bits sort as values do.
__device__ void LowerTo(float* squared, float value) {
  atomicMin(reinterpret_cast<unsigned*>(squared), __float_as_uint(value));
}

// Copies 16 bytes to shared memory; both addresses are multiples of 16.
__device__ void CopyAsync16(void* to, const void* from) {
#ifndef SLAP_CUDA_EMULATION
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
#else
  memcpy(to, from, 16);
#endif
}

__device__ void CommitCopies() {
#ifndef SLAP_CUDA_EMULATION
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until at most `kPending` committed groups of this thread are under way.
template <int kPending>
__device__ void WaitForCopies() {
#ifndef SLAP_CUDA_EMULATION
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
#endif
}

__device__ float Chain(float4 p, float4 q, float acc) {
  float t = __fsub_rn(p.x, q.x);
  acc = __fmaf_rn(t, t, acc);
  t = __fsub_rn(p.y, q.y);
  acc = __fmaf_rn(t, t, acc);
  t = __fsub_rn(p.z, q.z);
  acc = __fmaf_rn(t, t, acc);
  t = __fsub_rn(p.w, q.w);
  return __fmaf_rn(t, t, acc);
}

}  // namespace

#endif  // SLAP_CUDA_DEVICE_CUH_
