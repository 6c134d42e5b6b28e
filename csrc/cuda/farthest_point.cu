// Farthest-point selection on the GPU: the pool rounds of csrc/cpu/farthest_point.cpp as seven
// kernels a round, with the same bits. The state stays on the device; kernels queued past the end
// find nothing to do. The host queues as many rounds as are surely needed, reads how many picks are
// done, and queues more: a handful of reads a call.
//
//   FindPool        one block     choose the stratum, radix-select its kBlock farthest open points
//   PoolDistances   36 blocks     their distances to each other, 16 x 16 a block
//   Greedy          one warp      the exact selection inside the pool, distances in shared memory
//   FindTargets     n / 256       list the points that can still change
//   Filter          n / 64        64 points x 128 picks a block on the tensor cores: list the pairs
//                                 whose distance could be smaller than the point's
//   Recheck         fixed         their exact distances, 8 pairs a warp
//   Shrink          n / 64 x 2    in place of the two: every pair exactly, 64 x 64 a block
//
// csrc/tests/cuda_emulation.h runs these kernels without a GPU. Compiled with --fmad=false: where a
// multiply and an add are fused is part of the contract.
#include <stdint.h>

#include <string>
#include <vector>

#include "../slap_fps.h"
#include "../sound.h"
#include "device.cuh"
#include "filter.cuh"
#include "pool.cuh"
#include "shrink.cuh"

namespace {

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
  a.remaining = space->Take<int32_t>(p.g);
  a.left = space->Take<int32_t>(p.k);
  a.state = space->Take<State>(1);
  a.pool = space->Take<int32_t>(kBlock);
  a.pair = space->Take<float>(kBlock * kBlock);
  a.fresh = space->Take<int32_t>(kBlock);
  a.targets = space->Take<int32_t>(p.n);
  if (p.d >= kFilterMinimum && p.n <= kFilterMaximum) {
    a.half_stride = static_cast<int32_t>((p.d + kFilterDepth - 1) / kFilterDepth * kFilterDepth);
    a.halves = space->Take<uint16_t>(p.n * a.half_stride);
    a.centre = space->Take<float>(a.stride);
    a.half_norm = space->Take<float>(p.n);
    a.residual = space->Take<float>(p.n);
    a.close = space->Take<int2>(kCloseShare * p.n);
  }
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
  std::vector<int32_t> stratum(p.n, 0), begin(p.k + 1, 0), order(p.n), left(p.k), group, remaining;
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
    remaining.push_back(static_cast<int32_t>(p.quotas[g] < p.n ? p.quotas[g] : p.n));
  }
  if (!Upload(parts.order, order, stream) || !Upload(parts.begin, begin, stream) ||
      !Upload(parts.stratum, stratum, stream) || !Upload(parts.group, group, stream) ||
      !Upload(a.remaining, remaining, stream) || !Upload(a.left, left, stream) ||
      !Upload(a.state, std::vector<State>{state}, stream)) {
    return false;
  }
  if (NeedsWidening(p)) {
    const int64_t blocks = (p.n * a.stride + 255) / 256;
    SLAP_LAUNCH(Widen, static_cast<unsigned>(blocks < 8192 ? blocks : 8192), 256, 0, stream,
                p.features, p.bfloat16 != 0, p.n, static_cast<int>(p.d), a.stride, parts.rows);
    if (!Launched("Widen")) return false;
  }
  if (a.half_stride > 0) {
    SLAP_LAUNCH(Centre, (a.stride + 127) / 128, 128, 0, stream, a);
    if (!Launched("Centre")) return false;
    SLAP_LAUNCH(Halve, (a.n + 7) / 8, 256, 0, stream, a);
    if (!Launched("Halve")) return false;
  }
  SLAP_LAUNCH(Start, (a.n + 255) / 256, 256, 0, stream, a);
  return Launched("Start");
}

#ifdef SLAP_CUDA_EMULATION
// Over all calls: rounds; rounds that Shrink did; pairs of all rounds; pairs that Shrink did; pairs
// that the filter saw, and those it could not rule out; loads of FindPool's lanes, and the sectors
// of memory that its warps touched for them.
int64_t counts[8] = {};

void CountRound(const Arguments& a) {
  const State& s = *a.state;
  if (s.count == 0) return;
  const int64_t pairs = static_cast<int64_t>(s.targets) * s.count;
  const bool exact = s.exact != 0 || TooManyClose(a);
  const int64_t more[6] = {1, exact, pairs, exact ? pairs : 0, s.exact ? 0 : pairs, s.close};
  for (int i = 0; i < 6; ++i) counts[i] += more[i];
  counts[6] = emulation::loads;
  counts[7] = emulation::sectors;
}
#define SLAP_COUNT(a) CountRound(a)
#else
#define SLAP_COUNT(a)
#endif

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
  if (a.half_stride > 0) {
    SLAP_LAUNCH(Filter, (a.n + kFilterPoints - 1) / kFilterPoints, kFilterThreads, 0, stream, a);
    if (!Launched("Filter")) return false;
    SLAP_LAUNCH(Recheck, kRecheckBlocks, kRecheckThreads, 0, stream, a);
    if (!Launched("Recheck")) return false;
  }
  SLAP_LAUNCH(Shrink, dim3((a.n + kTile - 1) / kTile, kBlock / kTile), kShrinkThreads, 0, stream,
              a);
  SLAP_COUNT(a);
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

#ifdef SLAP_CUDA_EMULATION
SLAP_FPS_API const int64_t* slap_fps_cuda_counts(void) { return counts; }
#endif

SLAP_FPS_API int64_t slap_fps_cuda_workspace(const SlapFpsProblem* problem) {
  if (!slap::IsSound(*problem)) return 0;
  Workspace space(nullptr);
  Divide(*problem, &space);
  return space.used();
}

SLAP_FPS_API int32_t slap_fps_cuda(const SlapFpsProblem* problem, int32_t device, void* stream,
                                   void* workspace, int64_t* picks, float* pick_squared,
                                   float* squared) {
  if (!slap::IsSound(*problem)) return SLAP_FPS_BAD_ARGUMENT;
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
