// AVX-512 without VNNI: the exact kernels alone.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512_exact.h"

namespace slap {
namespace {

constexpr Kernels kKernels = {"avx512", Pack,    Accumulate, Shrink,
                              nullptr,  nullptr, nullptr,    nullptr};

}  // namespace

const Kernels* Avx512Kernels() { return &kKernels; }

}  // namespace slap

#else
const slap::Kernels* slap::Avx512Kernels() { return nullptr; }
#endif
