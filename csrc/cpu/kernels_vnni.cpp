// AVX-512 VNNI: the exact kernels behind a filter in 8-bit integers.
//
// A pick changes few points: most distances need not be known, only that they are too large. Each
// row is written as scale * q + rest with q in 8 bits, and with e = |scale_a q_a - scale_b q_b|
//
//     distance(a, b) >= e - |rest_a| - |rest_b|
//
// by the triangle inequality. e needs one integer dot product, exact, four products an instruction:
// four times the rate of float multiply-adds, eight times that of the exact chain. Pairs the bound
// does not rule out are computed exactly, so the filter changes the time and never a bit. Every
// rounding is accounted for: u = 2^-24 is float's unit, and constants are generous by a factor
// of 2.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "avx512_exact.h"

namespace slap {
namespace {

constexpr float kUnit = 5.9604645e-8f;  // 2^-24

__mmask16 Tail(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1);
}

Quantised Quantise(const float* row, const float* centre, int64_t d, uint8_t* q) {
  __m512 most = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 tail = Tail(d - i);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(tail, row + i),
                                   _mm512_maskz_loadu_ps(tail, centre + i));
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
  }
  const float largest = _mm512_reduce_max_ps(most);
  const float scale = largest / 127.0f;
  // Below this the inverse would overflow; q = 0 is a valid (and here a good enough) choice.
  const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
  const __m512 back = _mm512_set1_ps(scale);
  __m512 rest = _mm512_setzero_ps();
  __m512i squares = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 tail = Tail(d - i);
    const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(tail, row + i),
                                   _mm512_maskz_loadu_ps(tail, centre + i));
    const __m512i z = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    const __m512 r = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(z), back, x);
    rest = _mm512_fmadd_ps(r, r, rest);
    squares = _mm512_add_epi32(squares, _mm512_mullo_epi32(z, z));
    sum = _mm512_add_epi32(sum, z);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(z, _mm512_set1_epi32(128)));
    _mm_mask_storeu_epi8(q + i, tail, bytes);
  }
  const double norm = static_cast<double>(scale) * scale * _mm512_reduce_add_epi32(squares);
  const double error = __builtin_sqrt(static_cast<double>(_mm512_reduce_add_ps(rest)));
  // The sum of squares is off by a factor of (1 + u)^(d + 3) at most; row - centre by u of itself.
  // The constant stands for everything that may have underflowed.
  const double bound =
      error * (1.0 + (d + 16) * kUnit) + 2.0 * kUnit * (__builtin_sqrt(norm) + error) + 1e-18;
  Quantised result;
  result.scale = scale;
  result.norm = static_cast<float>(norm * (1.0 - 32.0 * kUnit));
  result.rest = static_cast<float>(bound * (1.0 + 8.0 * kUnit));
  result.shift = -128 * _mm512_reduce_add_epi32(sum);
  return result;
}

template <int kPicks>
void TileInt8(const uint32_t* panel, const int32_t* picks, int words, int32_t* acc) {
  __m512i a[kPicks], b[kPicks];
#pragma GCC unroll 12
  for (int j = 0; j < kPicks; ++j) {
    a[j] = _mm512_loadu_si512(acc + j * kLanes);
    b[j] = _mm512_loadu_si512(acc + j * kLanes + 16);
  }
  for (int i = 0; i < words; ++i) {
    const __m512i p = _mm512_loadu_si512(panel + i * kLanes);
    const __m512i q = _mm512_loadu_si512(panel + i * kLanes + 16);
#pragma GCC unroll 12
    for (int j = 0; j < kPicks; ++j) {
      const __m512i pick = _mm512_set1_epi32(picks[j * kStride + i]);
      a[j] = _mm512_dpbusd_epi32(a[j], p, pick);
      b[j] = _mm512_dpbusd_epi32(b[j], q, pick);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < kPicks; ++j) {
    _mm512_storeu_si512(acc + j * kLanes, a[j]);
    _mm512_storeu_si512(acc + j * kLanes + 16, b[j]);
  }
}

void AccumulateInt8(const uint32_t* panel, const int32_t* picks, int words, int count,
                    int32_t* acc) {
  using Function = void (*)(const uint32_t*, const int32_t*, int, int32_t*);
  static constexpr Function kTiles[] = {
      nullptr,     TileInt8<1>, TileInt8<2>, TileInt8<3>,  TileInt8<4>,  TileInt8<5>, TileInt8<6>,
      TileInt8<7>, TileInt8<8>, TileInt8<9>, TileInt8<10>, TileInt8<11>, TileInt8<12>};
  ForTiles(kTiles, panel, picks, words, count, acc);
}

// Every term of `e2` is right to a few u of norm_a + norm_b, by which the norms were rounded down.
int Suspects(const int32_t* acc, const Quantised* picks, int count, const LaneBounds* lanes,
             uint16_t* out) {
  int found = 0;
  for (int lane = 0; lane < kLanes; lane += 16) {
    const __m512 scale = _mm512_loadu_ps(lanes->scale + lane);
    const __m512 norm = _mm512_loadu_ps(lanes->norm + lane);
    const __m512 reach = _mm512_loadu_ps(lanes->reach + lane);
    for (int j = 0; j < count; ++j) {
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc + j * kLanes + lane));
      const __m512 e2 = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(picks[j].scale)),
                                        _mm512_add_ps(norm, _mm512_set1_ps(picks[j].norm)));
      const __m512 need = _mm512_add_ps(reach, _mm512_set1_ps(picks[j].rest));
      unsigned mask = _mm512_cmp_ps_mask(e2, _mm512_mul_ps(need, need), _CMP_LT_OQ);
      for (; mask != 0; mask &= mask - 1) {
        out[found++] = static_cast<uint16_t>(j << 5 | (lane + __builtin_ctz(mask)));
      }
    }
  }
  return found;
}

void Pairs(const float* const* a, const float* const* b, int64_t d, float* out) {
  __m512 acc = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 tail = Tail(d - i);
    __m512i t[16];
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      t[p] = _mm512_castps_si512(_mm512_sub_ps(_mm512_maskz_loadu_ps(tail, a[p] + i),
                                               _mm512_maskz_loadu_ps(tail, b[p] + i)));
    }
    Transpose16(t);
    // Past the end t is 0, and fma(0, 0, acc) is acc.
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const __m512 x = _mm512_castsi512_ps(t[p]);
      acc = _mm512_fmadd_ps(x, x, acc);
    }
  }
  _mm512_storeu_ps(out, acc);
}

constexpr Kernels kKernels = {"avx512 vnni", Pack,           Accumulate, Shrink,
                              Quantise,      AccumulateInt8, Suspects,   Pairs};

}  // namespace

const Kernels* VnniKernels() { return &kKernels; }

}  // namespace slap

#else
const slap::Kernels* slap::VnniKernels() { return nullptr; }
#endif
