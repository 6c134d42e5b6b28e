// The exact kernels in AVX-512, shared by kernels_avx512.cpp and kernels_vnni.cpp: a tile of 32
// lanes x 12 picks takes 24 of the 32 vector registers. Everything is static: each file that
// includes this is compiled with its own flags.
#ifndef SLAP_CPU_AVX512_EXACT_H_
#define SLAP_CPU_AVX512_EXACT_H_

#include <immintrin.h>

#include "kernels.h"

namespace slap {
namespace {

void Transpose16(__m512i r[16]) {
  __m512i u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  // r[4g + c] now holds, in its 128-bit part s, column 4s + c of rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    u[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    u[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    u[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    u[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = u[i];
}

void Pack(const uint32_t* const* rows, int words, uint32_t* panel) {
  for (int i = 0; i < words; i += 16) {
    for (int lane = 0; lane < kLanes; lane += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) r[j] = _mm512_loadu_si512(rows[lane + j] + i);
      Transpose16(r);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(panel + (i + j) * kLanes + lane, r[j]);
    }
  }
}

template <int kPicks>
void Tile(const float* panel, const float* picks, int words, float* acc) {
  __m512 a[kPicks], b[kPicks];
#pragma GCC unroll 12
  for (int j = 0; j < kPicks; ++j) {
    a[j] = _mm512_loadu_ps(acc + j * kLanes);
    b[j] = _mm512_loadu_ps(acc + j * kLanes + 16);
  }
  for (int i = 0; i < words; ++i) {
    const __m512 p = _mm512_loadu_ps(panel + i * kLanes);
    const __m512 q = _mm512_loadu_ps(panel + i * kLanes + 16);
#pragma GCC unroll 12
    for (int j = 0; j < kPicks; ++j) {
      const __m512 pick = _mm512_set1_ps(picks[j * kStride + i]);
      const __m512 s = _mm512_sub_ps(p, pick);
      a[j] = _mm512_fmadd_ps(s, s, a[j]);
      const __m512 t = _mm512_sub_ps(q, pick);
      b[j] = _mm512_fmadd_ps(t, t, b[j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < kPicks; ++j) {
    _mm512_storeu_ps(acc + j * kLanes, a[j]);
    _mm512_storeu_ps(acc + j * kLanes + 16, b[j]);
  }
}

constexpr int kMost = 12;

// Calls kTiles[size] on tiles of nearly equal size: twelve and a rest of one would waste the last.
template <typename Function, typename Point, typename Pick, typename Acc>
void ForTiles(const Function* tiles, const Point* panel, const Pick* picks, int words, int count,
              Acc* acc) {
  const int n = (count + kMost - 1) / kMost;
  for (int tile = 0; tile < n; ++tile) {
    const int begin = count * tile / n;
    const int size = count * (tile + 1) / n - begin;
    tiles[size](panel, picks + begin * kStride, words, acc + begin * kLanes);
  }
}

void Accumulate(const float* panel, const float* picks, int words, int count, float* acc) {
  using Function = void (*)(const float*, const float*, int, float*);
  static constexpr Function kTiles[] = {nullptr,  Tile<1>,  Tile<2>, Tile<3>, Tile<4>,
                                        Tile<5>,  Tile<6>,  Tile<7>, Tile<8>, Tile<9>,
                                        Tile<10>, Tile<11>, Tile<12>};
  ForTiles(kTiles, panel, picks, words, count, acc);
}

void Shrink(const float* acc, int count, float* current) {
  __m512 low = _mm512_loadu_ps(current);
  __m512 high = _mm512_loadu_ps(current + 16);
  for (int j = 0; j < count; ++j) {
    low = _mm512_min_ps(low, _mm512_loadu_ps(acc + j * kLanes));
    high = _mm512_min_ps(high, _mm512_loadu_ps(acc + j * kLanes + 16));
  }
  _mm512_storeu_ps(current, low);
  _mm512_storeu_ps(current + 16, high);
}

}  // namespace
}  // namespace slap

#endif  // SLAP_CPU_AVX512_EXACT_H_
