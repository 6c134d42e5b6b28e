// A bound that spares most pairs their exact chain, and changes no bit.
//
// Each point x is kept as y = bfloat16(x - centre), with r >= |x - centre - y|. For a point i and a
// pick j, |x_i - x_j| >= |y_i - y_j| - r_i - r_j, and |y_i - y_j|^2 / 2 = |y_i|^2 / 2 + |y_j|^2 / 2
// - y_i y_j, whose last term the tensor cores compute. A pair is ruled out where that shows its
// distance to be no smaller than the point's; the others go through the exact chain.
//
// What the bound allows for, u = 2^-24:
// - the tensor cores may cut each of the 16 products and the sum so far to 22 bits of the largest
//   (twice as coarse as was ever observed: Fasi et al., 2021): |error| <= gamma |y_i| |y_j|, and
//   |y_i| |y_j| <= (|y_i|^2 + |y_j|^2) / 2, so that it is taken off the norms beforehand;
// - the exact chain may come out below the true sum, by (1 - u)^(D + 2) at most;
// - sums and products of the bound itself, rounded.
// No sum overflows: the caller has seen to it that no squared distance does, and the centre lies
// among the points. Distances whose squares come near underflow are not ruled out.
#ifndef SLAP_CUDA_FILTER_CUH_
#define SLAP_CUDA_FILTER_CUH_

#include "device.cuh"

namespace {

constexpr int kFilterMinimum = 64;       // dimensions below which Shrink is as fast
constexpr int kFilterMaximum = 1 << 23;  // points: pairs of a round are counted in 31 bits
constexpr int kRest = 2;                 // rounds that the filter rests after it told too little
constexpr int kCloseShare = 8;     // pairs a point that may be rechecked: 1 / 16 of a full pool
constexpr int kCentreRows = 256;   // rows whose mean the centre is
constexpr int kFilterPoints = 64;  // a block
constexpr int kFilterThreads = 128;
constexpr int kFilterDepth = 32;                // dimensions a stage holds
constexpr int kFilterPitch = kFilterDepth + 8;  // bfloat16: 8 rows x 4 words hit all 32 banks
constexpr int kFilterStages = 3;
constexpr int kRecheckBlocks = 264;
constexpr int kRecheckThreads = 128;
constexpr int kRecheckPairs = 8;  // a warp
constexpr int kRecheckDepth = 64;
constexpr int kRecheckPitch = kRecheckDepth + 4;

// Whether more pairs came through than are worth rechecking one by one, or than there is room for.
__device__ bool TooManyClose(const Arguments& a) {
  const int64_t pairs = static_cast<int64_t>(a.state->targets) * a.state->count;
  return a.state->close > pairs / (kBlock / kCloseShare);
}

__global__ void Centre(Arguments a) {
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (column >= a.stride) return;
  const int count = min(a.n, kCentreRows);
  float mean = 0.0f;
  for (int s = 0; s < count; ++s) {
    const int64_t row = static_cast<int64_t>(s) * a.n / count;
    mean += a.rows[row * a.stride + column] / static_cast<float>(count);
  }
  a.centre[column] = mean;
}

__device__ uint16_t RoundToBfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ double SumOverWarp(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// A warp a row. In double, sums of squares are as good as exact here.
__global__ void Halve(Arguments a) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= a.n) return;
  const float* from = a.rows + static_cast<int64_t>(row) * a.stride;
  uint16_t* to = a.halves + static_cast<int64_t>(row) * a.half_stride;
  double norm = 0.0, off = 0.0, centred = 0.0;
  for (int d = lane; d < a.half_stride; d += 32) {
    const float value = d < a.stride ? __fsub_rn(from[d], a.centre[d]) : 0.0f;
    // Values whose products could underflow are left to the residual.
    const uint16_t half = fabsf(value) < 0x1p-60f ? 0 : RoundToBfloat16(value);
    const double y = __uint_as_float(static_cast<unsigned>(half) << 16);
    norm += y * y;
    off += (value - y) * (value - y);
    centred += static_cast<double>(value) * value;
    to[d] = half;
  }
  norm = SumOverWarp(norm);
  off = SumOverWarp(off);
  centred = SumOverWarp(centred);
  if (lane != 0) return;
  const double steps = a.half_stride / 16;
  const double gamma = steps * 18 * 0x1p-22 + 0x1p-21;
  a.half_norm[row] = __double2float_rd(norm * 0.5 * (1.0 - gamma));
  // `value` itself was rounded: another u of it.
  a.residual[row] = __double2float_ru(sqrt(off) * (1.0 + 0x1p-30) + sqrt(centred) * 0x1.1p-24);
}

// acc += A (16 x 16) B (16 x 8), a warp together, laid out as mma.m16n8k16 has it.
__device__ void MultiplyAdd(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifndef SLAP_CUDA_EMULATION
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulation::MultiplyAdd(acc, a, b);
#endif
}

// Warps 2 x 2, each 32 points x 64 picks; a thread 2 x 8 fragments of 4 products.
__global__ void __launch_bounds__(kFilterThreads) Filter(Arguments a) {
  constexpr int kRows = kFilterPoints + kBlock;
  __shared__ __align__(16) uint16_t tile[kFilterStages][kRows][kFilterPitch];
  __shared__ int rows[kRows];
  __shared__ float norm[kRows], reach[kRows];
  const int first = static_cast<int>(blockIdx.x) * kFilterPoints;
  const int count = a.state->count, targets = a.state->targets;
  if (a.state->exact != 0 || count == 0 || first >= targets) return;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;

  // A pair is ruled out where norm + norm - y y > (reach + reach)^2 / 2.
  const float chain = 1.0f + 0.51f * 0x1p-24f * static_cast<float>(a.stride + 8) + 0x1p-21f;
  for (int r = tid; r < kRows; r += kFilterThreads) {
    const bool is_pick = r >= kFilterPoints;
    const int row = is_pick ? a.fresh[min(r - kFilterPoints, count - 1)]
                            : a.targets[min(first + r, targets - 1)];
    rows[r] = row;
    norm[r] = a.half_norm[row];
    reach[r] = a.residual[row];
    if (!is_pick) reach[r] += fmaxf(sqrtf(a.squared[row]) * chain, 0x1p-40f);
  }
  __syncthreads();

  const int chunks = a.half_stride / kFilterDepth;
  const auto load = [&](int chunk) {
    for (int l = tid; chunk < chunks && l < kRows * (kFilterDepth / 8); l += kFilterThreads) {
      const int row = l / (kFilterDepth / 8), part = l % (kFilterDepth / 8) * 8;
      CopyAsync16(
          &tile[chunk % kFilterStages][row][part],
          a.halves + static_cast<int64_t>(rows[row]) * a.half_stride + chunk * kFilterDepth + part);
    }
    CommitCopies();  // an empty group past the end: the count of groups stays right
  };
  const int point0 = warp / 2 * 32, pick0 = warp % 2 * 64;
  const int group = lane / 4, pair = lane % 4 * 2;
  float acc[2][8][4] = {};
  load(0);
  load(1);
  for (int c = 0; c < chunks; ++c) {
    WaitForCopies<1>();
    __syncthreads();
    load(c + 2);  // into the stage that the barrier has shown to be free
    const auto& stage = tile[c % kFilterStages];
    const auto word = [&](int row, int column) {
      return *reinterpret_cast<const unsigned*>(&stage[row][column]);
    };
#pragma unroll
    for (int d = 0; d < kFilterDepth; d += 16) {
      const int k = d + pair;
      unsigned points[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = point0 + i * 16 + group;
        points[i][0] = word(row, k);
        points[i][1] = word(row + 8, k);
        points[i][2] = word(row, k + 8);
        points[i][3] = word(row + 8, k + 8);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = kFilterPoints + pick0 + j * 8 + group;
        const unsigned picks[2] = {word(row, k), word(row, k + 8)};
#pragma unroll
        for (int i = 0; i < 2; ++i) MultiplyAdd(acc[i][j], points[i], picks);
      }
    }
  }

  // The thread's pairs that came through, a bit each.
  unsigned through[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int point = point0 + i * 16 + group + e / 2 * 8, pick = pick0 + j * 8 + pair + e % 2;
        const float within = reach[point] + reach[kFilterPoints + pick];
        const float half = norm[point] + norm[kFilterPoints + pick] - acc[i][j][e];
        const bool ruled_out = half > within * within * (0.5f + 0x1p-22f);
        const bool exists = first + point < targets && pick < count;
        through[i] |= exists && !ruled_out ? 1u << (j * 4 + e) : 0;
      }
    }
  }
  const int mine = __popc(through[0]) + __popc(through[1]);
  int before = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, before, step);
    if (lane >= step) before += other;
  }
  int begin = 0;
  if (lane == 31 && before > 0) begin = atomicAdd(&a.state->close, before);
  int to = __shfl_sync(kAll, begin, 31) + before - mine;
  const int capacity = kCloseShare * a.n;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (unsigned left = through[i]; left != 0 && to < capacity; left &= left - 1, ++to) {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      const int point = point0 + i * 16 + group + bit % 4 / 2 * 8;
      const int pick = pick0 + bit / 4 * 8 + pair + bit % 2;
      a.close[to] = make_int2(rows[point], rows[kFilterPoints + pick]);
    }
  }
}

// Eight pairs a warp and a chain a lane: there are few pairs, and many warps hide the loads.
__global__ void __launch_bounds__(kRecheckThreads) Recheck(Arguments a) {
  constexpr int kWarps = kRecheckThreads / 32, kParts = kRecheckDepth / 4;
  __shared__ __align__(16) float tile[kWarps][2][2 * kRecheckPairs][kRecheckPitch];
  if (a.state->exact != 0 || a.state->count == 0 || TooManyClose(a)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int close = a.state->close, chunks = (a.stride + kRecheckDepth - 1) / kRecheckDepth;
  const int step = static_cast<int>(gridDim.x) * kWarps;
  for (int set = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
       set * kRecheckPairs < close; set += step) {
    // Lanes 0 to 7 know the rows of the points, lanes 8 to 15 those of the picks.
    const int2 pair = a.close[min(set * kRecheckPairs + lane % kRecheckPairs, close - 1)];
    const int own = lane < kRecheckPairs ? pair.x : pair.y;
    const auto load = [&](int chunk) {
      for (int l = lane; l < 2 * kRecheckPairs * kParts; l += 32) {
        const int row = l / kParts, at = chunk * kRecheckDepth + l % kParts * 4;
        const int64_t from = __shfl_sync(kAll, own, row);
        if (at < a.stride) {
          CopyAsync16(&tile[warp][chunk % 2][row][l % kParts * 4], a.rows + from * a.stride + at);
        }
      }
      CommitCopies();
    };
    float acc = 0.0f;
    load(0);
    for (int c = 0; c < chunks; ++c) {
      if (c + 1 < chunks) {
        load(c + 1);
        WaitForCopies<1>();
      } else {
        WaitForCopies<0>();
      }
      __syncwarp();
      const int depth = min(kRecheckDepth, a.stride - c * kRecheckDepth);
      for (int d = 0; lane < kRecheckPairs && d < depth; d += 4) {
        acc = Chain(*reinterpret_cast<const float4*>(&tile[warp][c % 2][lane][d]),
                    *reinterpret_cast<const float4*>(&tile[warp][c % 2][kRecheckPairs + lane][d]),
                    acc);
      }
      __syncwarp();
    }
    if (lane < kRecheckPairs && set * kRecheckPairs + lane < close) {
      LowerTo(&a.squared[pair.x], acc);
    }
  }
}

}  // namespace

#endif  // SLAP_CUDA_FILTER_CUH_
