// Farthest-point selection on the GPU: the pool rounds of csrc/cpu/farthest_point.cpp as five
// kernels a round, with the same bits. The state stays on the device; kernels queued past the end
// find nothing to do. The host queues as many rounds as are surely needed, reads how many picks are
// done, and queues more: a handful of reads a call.
//
//   FindPool        one block     choose the stratum, radix-select its kBlock farthest open points
//   PoolDistances   36 blocks     their distances to each other, 16 x 16 a block
//   Greedy          one warp      the exact selection inside the pool, distances in shared memory
//   FindTargets     n / 256       list the points that can still change
//   Shrink          n / 64        64 points x 128 picks a block, 8 x 8 a thread, minimum at the end
//
// csrc/tests/cuda_emulation.h runs these kernels without a GPU. Compiled with --fmad=false: where a
// multiply and an add are fused is part of the contract.
#include <stdint.h>

#include <string>
#include <vector>

#include "../slap_fps.h"

#ifndef SLAP_CUDA_EMULATION
#include <cuda_runtime.h>
#define SLAP_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define SLAP_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#else
#include "../tests/cuda_emulation.h"
#endif

namespace {

constexpr int kBlock = 128;      // points in a pool
constexpr int kTilePoints = 64;  // of Shrink
constexpr int kShrinkThreads = 128;
constexpr int kDepth = 16;          // dimensions a stage of Shrink holds
constexpr int kPitch = kDepth + 4;  // floats: 8 lanes that read 16 bytes each hit all 32 banks once
constexpr int kPoolTile = 16;
constexpr int kPoolDepth = 64;
constexpr int kPoolPitch = kPoolDepth + 4;
constexpr int kFindThreads = 1024;
constexpr int kBins = 2048;
constexpr unsigned kAll = 0xffffffffu;

struct State {
  int32_t stratum;
  int32_t done;     // picks made
  int32_t pool;     // points in the pool
  int32_t count;    // picks of this round
  int32_t targets;  // points that can still change
  int32_t unused;
  unsigned long long beyond;  // key of the best open point outside the pool
};

struct Arguments {
  int32_t n, k, g, m, first, across;
  int32_t stride;          // floats a row, a multiple of kDepth; padding is 0
  const float* rows;       // (n, stride)
  const int32_t* order;    // (n,) points sorted by stratum, then index
  const int32_t* begin;    // (k + 1,) where each stratum begins in `order`
  const int32_t* stratum;  // (n,)
  const int32_t* group;    // (n,), if g > 0
  int32_t* room;           // (g,) picks left
  int32_t* left;           // (k,) picks left
  State* state;
  int32_t* pool;        // (kBlock,) ascending
  float* pair;          // (kBlock, kBlock) squared distances inside the pool
  int32_t* fresh;       // (kBlock,) the round's picks
  int32_t* targets;     // (n,)
  float* squared;       // (n,); -1: picked
  int64_t* picks;       // (m,)
  float* pick_squared;  // (m,)
};

// Larger is picked first: the larger distance, then the lower index.
__device__ unsigned long long Key(unsigned bits, int index) {
  return static_cast<unsigned long long>(bits) << 32 | (kAll - static_cast<unsigned>(index));
}

__device__ bool IsOpen(const Arguments& a, int i) {
  return a.squared[i] >= 0.0f && (a.g == 0 || a.room[a.group[i]] > 0);
}

__device__ void CopyAsync16(float* to, const float* from) {
#ifndef SLAP_CUDA_EMULATION
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
#else
  for (int i = 0; i < 4; ++i) to[i] = from[i];
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

// The sum of `value` over the threads before this one; *total: over all. All kFindThreads call it.
__device__ int ExclusiveScan(int value, int* total) {
  __shared__ int sums[kFindThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAll, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  __syncthreads();  // `sums` may still be read from the call before
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kFindThreads / 32; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  *total = all;
  return before + inclusive - value;
}

// The value that the `rank`-th largest open distance of a range has (rank >= 1), as bits; *above:
// how many are larger. Three passes over 11, 11 and 9 bits.
__device__ unsigned SelectRank(const Arguments& a, int low, int high, int rank, int* above) {
  __shared__ int bins[kBins];
  __shared__ int chosen, larger;
  unsigned prefix = 0;
  *above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 9 : 0, width = pass < 2 ? 11 : 9;
    for (int bin = threadIdx.x; bin < kBins; bin += kFindThreads) bins[bin] = 0;
    __syncthreads();
    for (int p = low; p < high; ++p) {
      const int i = a.order[p];
      if (!IsOpen(a, i)) continue;
      const unsigned bits = __float_as_uint(a.squared[i]);
      if (bits >> (shift + width) != prefix >> (shift + width)) continue;
      atomicAdd(&bins[bits >> shift & ((1u << width) - 1)], 1);
    }
    __syncthreads();
    // Thread t owns two bins, the largest first.
    const int top = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    const int two = bins[top] + bins[top - 1];
    int total;
    int before = *above + ExclusiveScan(two, &total);
    for (int bin = top; bin >= top - 1; --bin) {
      if (before < rank && before + bins[bin] >= rank) {
        chosen = bin;
        larger = before;
      }
      before += bins[bin];
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(chosen) << shift;
    *above = larger;
    __syncthreads();
  }
  return prefix;
}

__global__ void __launch_bounds__(kFindThreads, 1) FindPool(Arguments a) {
  __shared__ unsigned long long best;
  State* state = a.state;
  const int tid = static_cast<int>(threadIdx.x);
  const int done = state->done;
  if (tid == 0) {
    state->pool = 0;
    state->count = 0;
    state->targets = 0;
    best = 0;
    if (done == 0) {
      a.pool[0] = a.first;
      state->pool = 1;
      state->beyond = 0;
    }
  }
  if (done == 0 || done >= a.m) return;

  int stratum = state->stratum, low = 0, high = 0, open = 0;
  for (;;) {
    const int begin = a.begin[stratum], end = a.begin[stratum + 1];
    const int share = (end - begin + kFindThreads - 1) / kFindThreads;
    low = min(begin + tid * share, end);
    high = min(low + share, end);
    const int spare = a.left[stratum];
    int mine = 0;
    for (int p = low; p < high && spare > 0; ++p) mine += IsOpen(a, a.order[p]) ? 1 : 0;
    ExclusiveScan(mine, &open);
    if (open > 0) break;
    const int next = (stratum + 1) % a.k;  // what a stratum cannot fill, the next one may
    if (tid == 0) {
      a.left[stratum] = 0;
      a.left[next] += spare;
    }
    stratum = next;
    __syncthreads();
  }

  const int taken = min(open, kBlock);
  int above = 0;
  const unsigned threshold = open > kBlock ? SelectRank(a, low, high, kBlock, &above) : 0;
  int equal = 0, larger = 0, total;
  for (int p = low; p < high; ++p) {
    if (!IsOpen(a, a.order[p])) continue;
    const unsigned bits = __float_as_uint(a.squared[a.order[p]]);
    equal += bits == threshold ? 1 : 0;
    larger += bits > threshold ? 1 : 0;
  }
  // Of the points at the threshold the lowest indices are taken. Without one, all points are.
  const int quota = open > kBlock ? kBlock - above : open;
  const int rank = ExclusiveScan(equal, &total);
  int at_threshold = min(equal, max(0, quota - rank));
  int to = ExclusiveScan(larger + at_threshold, &total);
  unsigned long long left_out = 0;
  for (int p = low; p < high; ++p) {
    const int i = a.order[p];
    if (!IsOpen(a, i)) continue;
    const unsigned bits = __float_as_uint(a.squared[i]);
    if (bits > threshold || (bits == threshold && at_threshold-- > 0)) {
      a.pool[to++] = i;
    } else {
      const unsigned long long key = Key(bits, i);
      left_out = key > left_out ? key : left_out;
    }
  }
  if (left_out > 0) atomicMax(&best, left_out);
  __syncthreads();
  if (tid == 0) {
    state->stratum = stratum;
    state->pool = taken;
    state->beyond = best;
  }
}

__global__ void __launch_bounds__(kPoolTile* kPoolTile) PoolDistances(Arguments a) {
  __shared__ __align__(16) float tile[2][2 * kPoolTile][kPoolPitch];
  const int size = a.state->pool;
  const int row0 = static_cast<int>(blockIdx.y) * kPoolTile;
  const int column0 = static_cast<int>(blockIdx.x) * kPoolTile;
  // A distance is symmetric to the bit; a pool of one needs none.
  if (size < 2 || column0 < row0 || column0 >= size) return;
  const int tid = static_cast<int>(threadIdx.x), y = tid / kPoolTile, x = tid % kPoolTile;
  constexpr int kParts = kPoolDepth / 4;

  const auto load = [&](int stage, int depth) {
    for (int l = tid; l < 2 * kPoolTile * kParts; l += kPoolTile * kPoolTile) {
      const int row = l / kParts, part = l % kParts * 4;
      const int at = row < kPoolTile ? row0 + row : column0 + row - kPoolTile;
      if (depth + part < a.stride) {
        const int64_t point = a.pool[min(at, size - 1)];
        CopyAsync16(&tile[stage][row][part], a.rows + point * a.stride + depth + part);
      }
    }
    CommitCopies();
  };
  float acc = 0.0f;
  const int chunks = (a.stride + kPoolDepth - 1) / kPoolDepth;
  load(0, 0);
  for (int c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) {
      load((c + 1) % 2, (c + 1) * kPoolDepth);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    const int depth = min(kPoolDepth, a.stride - c * kPoolDepth);
    for (int d = 0; d < depth; d += 4) {
      acc = Chain(*reinterpret_cast<const float4*>(&tile[c % 2][y][d]),
                  *reinterpret_cast<const float4*>(&tile[c % 2][kPoolTile + x][d]), acc);
    }
    __syncthreads();
  }
  a.pair[(row0 + y) * kBlock + column0 + x] = acc;
  a.pair[(column0 + x) * kBlock + row0 + y] = acc;
}

__global__ void __launch_bounds__(kBlock) Greedy(Arguments a) {
  SLAP_DYNAMIC_SHARED(float4, pair);  // (kBlock, kBlock / 4)
  __shared__ int order[kBlock];
  __shared__ float value[kBlock];
  __shared__ int made;
  State* state = a.state;
  const int size = state->pool;
  if (size == 0) return;
  const int tid = static_cast<int>(threadIdx.x);
  if (size > 1) {
    const float4* from = reinterpret_cast<const float4*>(a.pair);
    for (int i = tid; i < size * kBlock / 4; i += kBlock) pair[i] = from[i];
  }
  __syncthreads();

  if (tid < 32) {
    // Lane l holds pool points 4 l to 4 l + 3: their distance (a key of 0: not there, or picked)
    // and the picks their group has left.
    unsigned key[4];
    int group[4], room[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = tid * 4 + q < size ? a.pool[tid * 4 + q] : -1;
      key[q] = i >= 0 ? __float_as_uint(a.squared[i]) + 1 : 0;
      group[q] = i >= 0 && a.g > 0 ? a.group[i] : -1;
      room[q] = group[q] >= 0 ? a.room[group[q]] : 0;
    }
    const int most = state->done == 0 ? 1 : min(a.left[state->stratum], size);
    int count = 0;
    while (count < most) {
      const unsigned own = max(max(key[0], key[1]), max(key[2], key[3]));
      const unsigned best = __reduce_max_sync(kAll, own);
      if (best == 0) break;
      unsigned at = kAll;
#pragma unroll
      for (int q = 3; q >= 0; --q) at = key[q] == best ? tid * 4 + q : at;
      at = __reduce_min_sync(kAll, at);
      if (count > 0 && Key(best - 1, a.pool[at]) < state->beyond) break;
      if (tid == 0) {
        order[count] = static_cast<int>(at);
        value[count] = __uint_as_float(best - 1);
      }
      ++count;
      const int from = __shfl_sync(kAll,
                                   at % 4 == 0   ? group[0]
                                   : at % 4 == 1 ? group[1]
                                   : at % 4 == 2 ? group[2]
                                                 : group[3],
                                   static_cast<int>(at / 4));
      const float4 row = size > 1 ? pair[at * (kBlock / 4) + tid] : make_float4(0, 0, 0, 0);
      const float distance[4] = {row.x, row.y, row.z, row.w};
      bool full = false;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const bool picked = tid * 4 + q == static_cast<int>(at);
        const unsigned closer = __float_as_uint(distance[q]) + 1;
        key[q] = picked || key[q] == 0 ? 0 : min(key[q], closer);
        if (from >= 0 && group[q] == from) full = --room[q] == 0 || full;
      }
      if (__any_sync(kAll, full)) break;
    }
    if (tid == 0) made = count;
  }
  __syncthreads();

  const int done = state->done;
  if (tid < made) {
    const int pick = a.pool[order[tid]];
    a.picks[done + tid] = pick;
    a.pick_squared[done + tid] = value[tid];
    a.squared[pick] = -1.0f;
    a.fresh[tid] = pick;
    if (a.g > 0) atomicSub(&a.room[a.group[pick]], 1);
  }
  __syncthreads();
  if (tid == 0) {
    state->count = made;
    state->done = done + made;
    a.left[state->stratum] -= made;
  }
}

__global__ void FindTargets(Arguments a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (a.state->count == 0) return;
  // A distance of 0 cannot shrink. The order of the targets changes no result.
  const bool is_target =
      i < a.n && a.squared[i] > 0.0f && (a.across || a.stratum[i] == a.state->stratum);
  const unsigned mask = __ballot_sync(kAll, is_target);
  const int lane = static_cast<int>(threadIdx.x % 32);
  int begin = 0;
  if (lane == 0 && mask != 0) begin = atomicAdd(&a.state->targets, __popc(mask));
  begin = __shfl_sync(kAll, begin, 0);
  if (is_target) a.targets[begin + __popc(mask & ((1u << lane) - 1))] = i;
}

__global__ void __launch_bounds__(kShrinkThreads) Shrink(Arguments a) {
  __shared__ __align__(16) float tile[2][kTilePoints + kBlock][kPitch];
  __shared__ int rows[kTilePoints + kBlock];
  const int count = a.state->count, targets = a.state->targets;
  const int first = static_cast<int>(blockIdx.x) * kTilePoints;
  if (count == 0 || first >= targets) return;
  const int tid = static_cast<int>(threadIdx.x), y = tid / 16, x = tid % 16;
  for (int r = tid; r < kTilePoints + kBlock; r += kShrinkThreads) {
    rows[r] = r < kTilePoints ? a.targets[min(first + r, targets - 1)]
                              : a.fresh[min(r - kTilePoints, count - 1)];
  }
  __syncthreads();
  const int loaded = kTilePoints + (count + 15) / 16 * 16;

  const auto load = [&](int stage, int depth) {
    for (int l = tid; l < loaded * (kDepth / 4); l += kShrinkThreads) {
      const int row = l / (kDepth / 4), part = l % (kDepth / 4) * 4;
      CopyAsync16(&tile[stage][row][part],
                  a.rows + static_cast<int64_t>(rows[row]) * a.stride + depth + part);
    }
    CommitCopies();
  };
  float acc[8][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[i][j] = 0.0f;
  }
  const int chunks = a.stride / kDepth;
  load(0, 0);
  for (int c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) {
      load((c + 1) % 2, (c + 1) * kDepth);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < kDepth; d += 4) {
      float4 point[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        point[i] = *reinterpret_cast<const float4*>(&tile[c % 2][i * 8 + y][d]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j * 16 < count) {  // the same for all threads
          const float4 pick =
              *reinterpret_cast<const float4*>(&tile[c % 2][kTilePoints + j * 16 + x][d]);
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[i][j] = Chain(point[i], pick, acc[i][j]);
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float least = acc[i][0];  // rows past the last pick repeat it
#pragma unroll
    for (int j = 1; j < 8; ++j) least = j * 16 < count ? fminf(least, acc[i][j]) : least;
    for (int step = 8; step > 0; step /= 2) {
      least = fminf(least, __shfl_xor_sync(kAll, least, step));
    }
    const int at = i * 8 + y;
    if (x == 0 && first + at < targets) {
      a.squared[rows[at]] = fminf(a.squared[rows[at]], least);
    }
  }
}

__global__ void Start(Arguments a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < a.n) a.squared[i] = __uint_as_float(0x7f800000u);
}

__global__ void Finish(Arguments a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < a.n) a.squared[i] = fmaxf(a.squared[i], 0.0f);
}

// Rows of float32 whose length is a multiple of kDepth: widens bfloat16, pads with 0.
__global__ void Widen(const void* features, bool bfloat16, int64_t n, int d, int stride,
                      float* rows) {
  const int64_t size = n * stride;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += step) {
    const int64_t row = i / stride;
    const int column = static_cast<int>(i % stride);
    float value = 0.0f;
    if (column < d && bfloat16) {
      const unsigned bits = static_cast<const uint16_t*>(features)[row * d + column];
      value = __uint_as_float(bits << 16);
    } else if (column < d) {
      value = static_cast<const float*>(features)[row * d + column];
    }
    rows[i] = value;
  }
}

// Hands out parts of the workspace, aligned to 256 bytes; with no memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* Take(int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Whether cp.async can read the rows where they are.
bool NeedsWidening(const SlapFpsProblem& p) {
  return p.bfloat16 || p.d % kDepth != 0 || reinterpret_cast<uintptr_t>(p.features) % 16 != 0;
}

struct Parts {
  Arguments a;
  float* rows;
  int32_t *order, *begin, *stratum, *group;
};

Parts Divide(const SlapFpsProblem& p, Workspace* space) {
  Parts parts{};
  Arguments& a = parts.a;
  a.n = static_cast<int32_t>(p.n);
  a.k = static_cast<int32_t>(p.k);
  a.g = static_cast<int32_t>(p.g);
  a.m = static_cast<int32_t>(p.m);
  a.first = static_cast<int32_t>(p.first);
  a.across = p.across_strata;
  a.stride = static_cast<int32_t>((p.d + kDepth - 1) / kDepth * kDepth);
  parts.rows = space->Take<float>(NeedsWidening(p) ? p.n * a.stride : 0);
  a.rows = NeedsWidening(p) ? parts.rows : static_cast<const float*>(p.features);
  a.order = parts.order = space->Take<int32_t>(p.n);
  a.begin = parts.begin = space->Take<int32_t>(p.k + 1);
  a.stratum = parts.stratum = space->Take<int32_t>(p.n);
  a.group = parts.group = space->Take<int32_t>(p.g > 0 ? p.n : 0);
  a.room = space->Take<int32_t>(p.g);
  a.left = space->Take<int32_t>(p.k);
  a.state = space->Take<State>(1);
  a.pool = space->Take<int32_t>(kBlock);
  a.pair = space->Take<float>(kBlock * kBlock);
  a.fresh = space->Take<int32_t>(kBlock);
  a.targets = space->Take<int32_t>(p.n);
  return parts;
}

thread_local std::string last_error;

// Remembers what failed and where; true where nothing did.
bool Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return true;
  last_error = std::string(what) + ": " + cudaGetErrorString(status);
  return false;
}

bool Launched(const char* kernel) { return Check(cudaGetLastError(), kernel); }

template <typename T>
bool Upload(T* to, const std::vector<T>& from, cudaStream_t stream) {
  if (from.empty()) return true;
  // From pageable memory: the call returns once the host's copy may go.
  return Check(
      cudaMemcpyAsync(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream),
      "upload");
}

bool Prepare(const SlapFpsProblem& p, const Parts& parts, cudaStream_t stream) {
  const Arguments& a = parts.a;
  std::vector<int32_t> stratum(p.n, 0), begin(p.k + 1, 0), order(p.n), left(p.k), group, room;
  for (int64_t i = 0; i < p.n && p.strata != nullptr; ++i) {
    stratum[i] = static_cast<int32_t>(p.strata[i]);
  }
  for (const int32_t s : stratum) ++begin[s + 1];
  for (int64_t s = 0; s < p.k; ++s) begin[s + 1] += begin[s];
  std::vector<int32_t> next(begin);
  for (int32_t i = 0; i < a.n; ++i) order[next[stratum[i]]++] = i;
  State state{};
  for (int64_t s = 0; s < p.k; ++s) left[s] = static_cast<int32_t>(p.budgets[s]);
  while (left[state.stratum] == 0) ++state.stratum;
  for (int64_t i = 0; i < p.n && p.g > 0; ++i) group.push_back(static_cast<int32_t>(p.groups[i]));
  for (int64_t g = 0; g < p.g; ++g) {
    room.push_back(static_cast<int32_t>(p.quotas[g] < p.n ? p.quotas[g] : p.n));
  }
  if (!Upload(parts.order, order, stream) || !Upload(parts.begin, begin, stream) ||
      !Upload(parts.stratum, stratum, stream) || !Upload(parts.group, group, stream) ||
      !Upload(a.room, room, stream) || !Upload(a.left, left, stream) ||
      !Upload(a.state, std::vector<State>{state}, stream)) {
    return false;
  }
  if (NeedsWidening(p)) {
    const int64_t blocks = (p.n * a.stride + 255) / 256;
    SLAP_LAUNCH(Widen, static_cast<unsigned>(blocks < 8192 ? blocks : 8192), 256, 0, stream,
                p.features, p.bfloat16 != 0, p.n, static_cast<int>(p.d), a.stride, parts.rows);
    if (!Launched("Widen")) return false;
  }
  SLAP_LAUNCH(Start, (a.n + 255) / 256, 256, 0, stream, a);
  return Launched("Start");
}

bool QueueRound(const Arguments& a, cudaStream_t stream) {
  constexpr int kTiles = kBlock / kPoolTile;
  constexpr int kShared = kBlock * kBlock * sizeof(float);
  SLAP_LAUNCH(FindPool, 1, kFindThreads, 0, stream, a);
  if (!Launched("FindPool")) return false;
  SLAP_LAUNCH(PoolDistances, dim3(kTiles, kTiles), kPoolTile * kPoolTile, 0, stream, a);
  if (!Launched("PoolDistances")) return false;
  SLAP_LAUNCH(Greedy, 1, kBlock, kShared, stream, a);
  if (!Launched("Greedy")) return false;
  SLAP_LAUNCH(FindTargets, (a.n + 255) / 256, 256, 0, stream, a);
  if (!Launched("FindTargets")) return false;
  SLAP_LAUNCH(Shrink, (a.n + kTilePoints - 1) / kTilePoints, kShrinkThreads, 0, stream, a);
  return Launched("Shrink");
}

bool Select(const SlapFpsProblem& p, const Parts& parts, cudaStream_t stream) {
  const Arguments& a = parts.a;
  if (!Check(cudaFuncSetAttribute(Greedy, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kBlock * kBlock * sizeof(float)),
             "shared memory of Greedy") ||
      !Prepare(p, parts, stream)) {
    return false;
  }
  for (int32_t done = 0; done < a.m;) {
    const int rounds = (a.m - done + kBlock - 1) / kBlock;  // none of them can be in vain
    for (int round = 0; round < rounds; ++round) {
      if (!QueueRound(a, stream)) return false;
    }
    const int32_t before = done;
    if (!Check(cudaMemcpyAsync(&done, &a.state->done, sizeof done, cudaMemcpyDeviceToHost, stream),
               "progress") ||
        !Check(cudaStreamSynchronize(stream), "a queued kernel")) {
      return false;
    }
    if (done <= before) {
      last_error = "no progress: the problem and its budgets do not fit";
      return false;
    }
  }
  SLAP_LAUNCH(Finish, (a.n + 255) / 256, 256, 0, stream, a);
  return Launched("Finish");
}

}  // namespace

extern "C" {

SLAP_FPS_API int32_t slap_fps_abi(void) { return SLAP_FPS_ABI; }

SLAP_FPS_API const char* slap_fps_cuda_error(void) { return last_error.c_str(); }

SLAP_FPS_API int64_t slap_fps_cuda_workspace(const SlapFpsProblem* problem) {
  Workspace space(nullptr);
  Divide(*problem, &space);
  return space.used();
}

SLAP_FPS_API int32_t slap_fps_cuda(const SlapFpsProblem* problem, int32_t device, void* stream,
                                   void* workspace, int64_t* picks, float* pick_squared,
                                   float* squared) {
  int previous = 0;
  if (!Check(cudaGetDevice(&previous), "device") || !Check(cudaSetDevice(device), "device")) {
    return SLAP_FPS_CUDA_ERROR;
  }
  Workspace space(workspace);
  Parts parts = Divide(*problem, &space);
  parts.a.picks = picks;
  parts.a.pick_squared = pick_squared;
  parts.a.squared = squared;
  const bool done = Select(*problem, parts, static_cast<cudaStream_t>(stream));
  const bool restored = Check(cudaSetDevice(previous), "device");
  return done && restored ? SLAP_FPS_OK : SLAP_FPS_CUDA_ERROR;
}

}  // extern "C"
