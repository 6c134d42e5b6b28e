// What an instruction set must provide. The files that implement it are compiled with flags of
// their own and must not instantiate templates of the standard library: the linker keeps one copy
// of each, and it could be the one this processor cannot run.
#ifndef SLAP_CPU_KERNELS_H_
#define SLAP_CPU_KERNELS_H_

#include <stdint.h>

namespace slap {

constexpr int kLanes = 32;    // points a panel holds, side by side
constexpr int kChunk = 512;   // 32-bit words of each row worked on at a time: 64 KiB a panel
constexpr int kStride = 528;  // words between two pick rows; no multiple of a cache way
constexpr int kPairs = 16;    // pairs `pairs` works on at once

// A row in 8 bits a value: row - centre = scale * q + rest.
struct Quantised {
  float scale;
  float norm;     // scale^2 |q|^2, rounded down
  float rest;     // |rest|, rounded up
  int32_t shift;  // -128 * sum(q): undoes the offset of the unsigned operand
};

// Bounds of the 32 points of a panel.
struct LaneBounds {
  float scale[kLanes];  // -2 * Quantised::scale
  float norm[kLanes];
  float reach[kLanes];  // current distance + rest, rounded up: nothing farther than this can shrink
                        // it
};

struct Kernels {
  const char* name;
  // Transposes `words` (a multiple of 16 readable words, at most kChunk) of 32 rows:
  // panel[word][lane].
  void (*pack)(const uint32_t* const* rows, int words, uint32_t* panel);
  // acc[j][lane] = the chain acc = fma(t, t, acc), t = panel[i][lane] - picks[j][i], for i in
  // order.
  void (*accumulate)(const float* panel, const float* picks, int words, int count, float* acc);
  // current[lane] = min(current[lane], acc[j][lane]) over j.
  void (*shrink)(const float* acc, int count, float* current);

  // The filter; all null where the instruction set has none.
  Quantised (*quantise)(const float* row, const float* centre, int64_t d, uint8_t* q);
  // acc[j][lane] += dot(q of the lane + 128, q of pick j), four values a word.
  void (*accumulate_int8)(const uint32_t* panel, const int32_t* picks, int words, int count,
                          int32_t* acc);
  // Writes (j << 5 | lane) of every pair whose distance could shrink its point; returns how many.
  int (*suspects)(const int32_t* acc, const Quantised* picks, int count, const LaneBounds* lanes,
                  uint16_t* out);
  // out[p] = the chain of accumulate for 16 pairs of rows.
  void (*pairs)(const float* const* a, const float* const* b, int64_t d, float* out);
};

const Kernels* PortableKernels();
const Kernels* Avx2Kernels();    // null where not compiled in; running it needs AVX2 and FMA
const Kernels* Avx512Kernels();  // AVX-512 F, BW, DQ, VL
const Kernels* VnniKernels();    // those and AVX-512 VNNI

}  // namespace slap

#endif  // SLAP_CPU_KERNELS_H_
