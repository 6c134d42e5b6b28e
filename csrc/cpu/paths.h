// Which kernels this processor has, and which of them are the fastest here.

#ifndef SLAP_CPU_PATHS_H_
#define SLAP_CPU_PATHS_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "../slap_fps.h"
#include "kernels.h"
#include "storage.h"

namespace slap {

inline bool Supports(int32_t path) {
  switch (path) {
    case SLAP_FPS_PORTABLE:
      return true;
#if defined(__x86_64__)
    case SLAP_FPS_AVX2:
      return Avx2Kernels() != nullptr && __builtin_cpu_supports("avx2") &&
             __builtin_cpu_supports("fma");
    case SLAP_FPS_AVX512:
    case SLAP_FPS_VNNI:
      if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
        return false;
      }
      if (path == SLAP_FPS_AVX512) return Avx512Kernels() != nullptr;
      return VnniKernels() != nullptr && __builtin_cpu_supports("avx512vnni");
#endif
    default:
      return false;
  }
}

inline const Kernels* KernelsOf(int32_t path) {
  switch (path) {
    case SLAP_FPS_AVX2:
      return Avx2Kernels();
    case SLAP_FPS_AVX512:
      return Avx512Kernels();
    case SLAP_FPS_VNNI:
      return VnniKernels();
    default:
      return PortableKernels();
  }
}

// The least of a few timings of one full tile, in seconds.
inline double TileSeconds(const Kernels& kernels) {
  constexpr int kPicks = 12;
  Buffer<float> panel(kChunk * kLanes), picks(kPicks * kStride), acc(kPicks * kLanes);
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    kernels.accumulate(panel.get(), picks.get(), kChunk, kPicks, acc.get());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    least = std::min(least, took.count());
  }
  return least;
}

// The filter wins wherever there is one. Without it, wider is not always faster: some processors
// run AVX-512 at half rate, and AVX2 can add and multiply on separate ports.
inline int32_t MeasureAutoPath() {
  if (Supports(SLAP_FPS_VNNI)) return SLAP_FPS_VNNI;
  if (!Supports(SLAP_FPS_AVX2)) return SLAP_FPS_PORTABLE;
  if (!Supports(SLAP_FPS_AVX512)) return SLAP_FPS_AVX2;
  return TileSeconds(*Avx512Kernels()) < TileSeconds(*Avx2Kernels()) ? SLAP_FPS_AVX512
                                                                     : SLAP_FPS_AVX2;
}

}  // namespace slap

#endif  // SLAP_CPU_PATHS_H_
