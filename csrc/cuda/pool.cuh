// A round's picks: the pool of the farthest open points, their distances to each other, and the
// exact greedy selection among them.
#ifndef SLAP_CUDA_POOL_CUH_
#define SLAP_CUDA_POOL_CUH_

#include "device.cuh"
#include "filter.cuh"

namespace {

constexpr int kPoolTile = 16;
constexpr int kPoolDepth = 64;
constexpr int kPoolPitch = kPoolDepth + 4;
constexpr int kFindThreads = 1024;
constexpr int kBins = 2048;

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

// The key bits of an open point + 1, else 0.
__device__ unsigned OpenBits(const Arguments& a, int p, int high) {
  if (p >= high) return 0;
  const int i = SLAP_COUNTED(a.order[p]);
  const float squared = SLAP_COUNTED(a.squared[i]);
  return IsOpen(a, i) ? __float_as_uint(squared) + 1 : 0;
}

constexpr int kCached = 16;  // points of a thread kept in registers: up to 16,384 in a stratum

// The value that the `rank`-th largest open distance of a range has (rank >= 1), as bits; *above:
// how many are larger. Three passes over 11, 11 and 9 bits.
template <typename Each>
__device__ unsigned SelectRank(const Each& each, int rank, int* above) {
  __shared__ int bins[kBins];
  __shared__ int chosen, larger;
  unsigned prefix = 0;
  *above = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 20 : pass == 1 ? 9 : 0, width = pass < 2 ? 11 : 9;
    for (int bin = threadIdx.x; bin < kBins; bin += kFindThreads) bins[bin] = 0;
    __syncthreads();
    each([&](int, unsigned key) {
      const unsigned bits = key - 1;
      if (key != 0 && bits >> (shift + width) == prefix >> (shift + width)) {
        atomicAdd(&bins[bits >> shift & ((1u << width) - 1)], 1);
      }
    });
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

// Whether Shrink or the filter does the coming round. The filter rests while it told too little.
__device__ void DecideExact(const Arguments& a) {
  State* state = a.state;
  if (state->done == 0) state->rest = 2;  // half of all pairs shrink a distance to a single pick
  if (state->exact == 0 && TooManyClose(a)) state->rest = kRest;
  state->exact = a.half_stride == 0 || state->rest > 0 ? 1 : 0;
  if (state->rest > 0) --state->rest;
}

__global__ void __launch_bounds__(kFindThreads, 1) FindPool(Arguments a) {
  __shared__ unsigned long long best;
  State* state = a.state;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int done = state->done;
  if (tid == 0) {
    DecideExact(a);
    state->pool = 0;
    state->count = 0;
    state->targets = 0;
    state->close = 0;
    best = 0;
    if (done == 0) {
      a.pool[0] = a.first;
      state->pool = 1;
      state->beyond = 0;
    }
  }
  if (done == 0 || done >= a.m) return;

  // A warp owns a range of the stratum and its lanes take turns: every load is coalesced, and the
  // first points of each lane stay in registers over all passes.
  unsigned cached[kCached];
  int low = 0, high = 0, stratum = state->stratum, open = 0;
  const auto each = [&](const auto& use) {
#pragma unroll
    for (int r = 0; r < kCached; ++r) {
      if (low + r * 32 < high) use(low + r * 32 + lane, cached[r]);
    }
    for (int base = low + kCached * 32; base < high; base += 32) {
      use(base + lane, OpenBits(a, base + lane, high));
    }
  };
  for (int tries = 0;; ++tries) {
    const int begin = a.begin[stratum], end = a.begin[stratum + 1];
    const int share = (end - begin + kFindThreads - 1) / kFindThreads * 32;
    low = min(begin + tid / 32 * share, end);
    high = min(low + share, end);
    const int spare = a.left[stratum];
#pragma unroll
    for (int r = 0; r < kCached; ++r) {
      cached[r] = spare > 0 ? OpenBits(a, low + r * 32 + lane, high) : 0;
    }
    int mine = 0;
    if (spare > 0) each([&](int, unsigned key) { mine += key != 0 ? 1 : 0; });
    ExclusiveScan(mine, &open);
    if (open > 0) break;
    if (tries > a.k) return;  // nothing is open anywhere: the host sees that nothing was picked
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
  const unsigned threshold = open > kBlock ? SelectRank(each, kBlock, &above) : 0;
  int equal = 0, larger = 0, total;
  each([&](int, unsigned key) {
    equal += key != 0 && key - 1 == threshold ? 1 : 0;
    larger += key != 0 && key - 1 > threshold ? 1 : 0;
  });
  // Of the points at the threshold the lowest indices are taken. Without one, all points are.
  const int quota = open > kBlock ? kBlock - above : open;
  int equals = __shfl_sync(kAll, ExclusiveScan(equal, &total), 0);  // before this warp
  int largers = __shfl_sync(kAll, ExclusiveScan(larger, &total), 0);
  unsigned long long left_out = 0;
  const unsigned before = (1u << lane) - 1;
  each([&](int p, unsigned key) {
    const unsigned at = __ballot_sync(kAll, key != 0 && key - 1 == threshold);
    const unsigned over = __ballot_sync(kAll, key != 0 && key - 1 > threshold);
    if (key != 0) {
      const int i = a.order[p];
      const int rank = equals + __popc(at & before), beat = largers + __popc(over & before);
      if (key - 1 > threshold || (key - 1 == threshold && rank < quota)) {
        a.pool[beat + min(rank, quota)] = i;
      } else {
        const unsigned long long mine = Key(key - 1, i);
        left_out = mine > left_out ? mine : left_out;
      }
    }
    equals += __popc(at);
    largers += __popc(over);
  });
  for (int step = 16; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAll, left_out, step);
    left_out = other > left_out ? other : left_out;
  }
  if (lane == 0 && left_out > 0) atomicMax(&best, left_out);
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
    int group[4], remaining[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int i = tid * 4 + q < size ? a.pool[tid * 4 + q] : -1;
      key[q] = i >= 0 ? __float_as_uint(a.squared[i]) + 1 : 0;
      group[q] = i >= 0 && a.g > 0 ? a.group[i] : -1;
      remaining[q] = group[q] >= 0 ? a.remaining[group[q]] : 0;
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
        if (from >= 0 && group[q] == from) full = --remaining[q] == 0 || full;
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
    if (a.g > 0) atomicSub(&a.remaining[a.group[pick]], 1);
  }
  __syncthreads();
  if (tid == 0) {
    state->count = made;
    state->done = done + made;
    a.left[state->stratum] -= made;
  }
}

}  // namespace

#endif  // SLAP_CUDA_POOL_CUH_
