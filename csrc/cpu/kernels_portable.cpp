// Any processor. The lane loops are vectorised by the compiler where the baseline has a fused
// multiply-add (aarch64); on x86-64 without one, fmaf is a call into the maths library.
#include "kernels.h"

namespace slap {
namespace {

void Pack(const uint32_t* const* rows, int words, uint32_t* panel) {
  for (int i = 0; i < words; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) panel[i * kLanes + lane] = rows[lane][i];
  }
}

void Accumulate(const float* panel, const float* picks, int words, int count, float* acc) {
  for (int j = 0; j < count; ++j) {
    float chain[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) chain[lane] = acc[j * kLanes + lane];
    for (int i = 0; i < words; ++i) {
      const float pick = picks[j * kStride + i];
      for (int lane = 0; lane < kLanes; ++lane) {
        const float t = panel[i * kLanes + lane] - pick;
        chain[lane] = __builtin_fmaf(t, t, chain[lane]);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) acc[j * kLanes + lane] = chain[lane];
  }
}

void Shrink(const float* acc, int count, float* current) {
  for (int j = 0; j < count; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = acc[j * kLanes + lane];
      current[lane] = value < current[lane] ? value : current[lane];
    }
  }
}

constexpr Kernels kKernels = {"portable", Pack,    Accumulate, Shrink,
                              nullptr,    nullptr, nullptr,    nullptr};

}  // namespace

const Kernels* PortableKernels() { return &kKernels; }

}  // namespace slap
