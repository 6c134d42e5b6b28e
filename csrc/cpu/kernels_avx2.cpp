// AVX2 and FMA: a tile of 16 lanes x 6 picks fills the 16 vector registers.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace slap {
namespace {

void Transpose8(__m256 r[8]) {
  __m256 u[8], v[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    u[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
}

void Pack(const uint32_t* const* rows, int words, uint32_t* panel) {
  for (int i = 0; i < words; i += 8) {
    for (int lane = 0; lane < kLanes; lane += 8) {
      __m256 r[8];
      for (int j = 0; j < 8; ++j) {
        r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[lane + j] + i));
      }
      Transpose8(r);
      for (int j = 0; j < 8; ++j) {
        _mm256_storeu_ps(reinterpret_cast<float*>(panel + (i + j) * kLanes + lane), r[j]);
      }
    }
  }
}

template <int kPicks>
void Tile(const float* panel, const float* picks, int words, float* acc) {
  __m256 a[kPicks], b[kPicks];
#pragma GCC unroll 6
  for (int j = 0; j < kPicks; ++j) {
    a[j] = _mm256_loadu_ps(acc + j * kLanes);
    b[j] = _mm256_loadu_ps(acc + j * kLanes + 8);
  }
  for (int i = 0; i < words; ++i) {
    const __m256 p = _mm256_loadu_ps(panel + i * kLanes);
    const __m256 q = _mm256_loadu_ps(panel + i * kLanes + 8);
#pragma GCC unroll 6
    for (int j = 0; j < kPicks; ++j) {
      const __m256 pick = _mm256_broadcast_ss(picks + j * kStride + i);
      const __m256 s = _mm256_sub_ps(p, pick);
      a[j] = _mm256_fmadd_ps(s, s, a[j]);
      const __m256 t = _mm256_sub_ps(q, pick);
      b[j] = _mm256_fmadd_ps(t, t, b[j]);
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < kPicks; ++j) {
    _mm256_storeu_ps(acc + j * kLanes, a[j]);
    _mm256_storeu_ps(acc + j * kLanes + 8, b[j]);
  }
}

using TileFunction = void (*)(const float*, const float*, int, float*);
constexpr TileFunction kTiles[] = {nullptr, Tile<1>, Tile<2>, Tile<3>, Tile<4>, Tile<5>, Tile<6>};
constexpr int kMost = 6;

void Accumulate(const float* panel, const float* picks, int words, int count, float* acc) {
  const int tiles = (count + kMost - 1) / kMost;
  for (int tile = 0; tile < tiles; ++tile) {
    const int begin = count * tile / tiles;
    const int size = count * (tile + 1) / tiles - begin;
    for (int half = 0; half < kLanes; half += 16) {
      kTiles[size](panel + half, picks + begin * kStride, words, acc + begin * kLanes + half);
    }
  }
}

void Shrink(const float* acc, int count, float* current) {
  for (int lane = 0; lane < kLanes; lane += 8) {
    __m256 least = _mm256_loadu_ps(current + lane);
    for (int j = 0; j < count; ++j) {
      least = _mm256_min_ps(least, _mm256_loadu_ps(acc + j * kLanes + lane));
    }
    _mm256_storeu_ps(current + lane, least);
  }
}

constexpr Kernels kKernels = {"avx2", Pack, Accumulate, Shrink, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Kernels* Avx2Kernels() { return &kKernels; }

}  // namespace slap

#else
const slap::Kernels* slap::Avx2Kernels() { return nullptr; }
#endif
