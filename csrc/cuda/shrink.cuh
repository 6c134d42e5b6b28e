// The round's picks applied to all points that they can still change, every pair by the exact
// chain.
#ifndef SLAP_CUDA_SHRINK_CUH_
#define SLAP_CUDA_SHRINK_CUH_

#include "device.cuh"
#include "filter.cuh"

namespace {

constexpr int kTile = 64;  // points, and picks, of a block of Shrink
constexpr int kShrinkThreads = 128;

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

// A block has 64 points and 64 picks, a thread 8 x 4 of them: small enough that the blocks of a
// round fill a GPU evenly. The minimum over the picks of two blocks is the same in any order.
__global__ void __launch_bounds__(kShrinkThreads) Shrink(Arguments a) {
  __shared__ __align__(16) float tile[2][2 * kTile][kPitch];
  __shared__ int rows[2 * kTile];
  const int first = static_cast<int>(blockIdx.x) * kTile;
  const int first_pick = static_cast<int>(blockIdx.y) * kTile;
  const int targets = a.state->targets, count = min(a.state->count - first_pick, kTile);
  if (count <= 0 || first >= targets || (a.state->exact == 0 && !TooManyClose(a))) return;
  const int tid = static_cast<int>(threadIdx.x), y = tid / 16, x = tid % 16;
  for (int r = tid; r < 2 * kTile; r += kShrinkThreads) {
    rows[r] = r < kTile ? a.targets[min(first + r, targets - 1)]
                        : a.fresh[first_pick + min(r - kTile, count - 1)];
  }
  __syncthreads();
  const int loaded = kTile + (count + 15) / 16 * 16;

  const auto load = [&](int stage, int depth) {
    for (int l = tid; l < loaded * (kDepth / 4); l += kShrinkThreads) {
      const int row = l / (kDepth / 4), part = l % (kDepth / 4) * 4;
      CopyAsync16(&tile[stage][row][part],
                  a.rows + static_cast<int64_t>(rows[row]) * a.stride + depth + part);
    }
    CommitCopies();
  };
  float acc[8][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
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
#pragma unroll 2
    for (int d = 0; d < kDepth; d += 4) {
      float4 point[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        point[i] = *reinterpret_cast<const float4*>(&tile[c % 2][i * 8 + y][d]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j * 16 < count) {  // the same for all threads
          const float4 pick = *reinterpret_cast<const float4*>(&tile[c % 2][kTile + j * 16 + x][d]);
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
    for (int j = 1; j < 4; ++j) least = j * 16 < count ? fminf(least, acc[i][j]) : least;
    for (int step = 8; step > 0; step /= 2) {
      least = fminf(least, __shfl_xor_sync(kAll, least, step));
    }
    const int at = i * 8 + y;
    if (x == 0 && first + at < targets) LowerTo(&a.squared[rows[at]], least);
  }
}

}  // namespace

#endif  // SLAP_CUDA_SHRINK_CUH_
