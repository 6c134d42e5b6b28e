// Whether a problem can be worked on at all: the one check of the CPU's and the GPU's library.
#ifndef SLAP_SOUND_H_
#define SLAP_SOUND_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "slap_fps.h"

namespace slap {

constexpr int64_t kMaxDimensions = 65536;

inline bool InRange(const int64_t* ids, int64_t n, int64_t count) {
  return std::all_of(ids, ids + n, [count](int64_t id) { return id >= 0 && id < count; });
}

// Whatever could index out of bounds or never end. Messages are the caller's business.
inline bool IsSound(const SlapFpsProblem& p) {
  if (p.n < 1 || p.n > std::numeric_limits<int32_t>::max() || p.d < 1 || p.d > kMaxDimensions ||
      p.k < 1 || p.g < 0 || p.m < 1 || p.m > p.n || p.first < 0 || p.first >= p.n ||
      p.features == nullptr || p.budgets == nullptr) {
    return false;
  }
  int64_t sum = 0;
  for (int64_t k = 0; k < p.k; ++k) {
    if (p.budgets[k] < 0 || p.budgets[k] > p.n) return false;
    sum += p.budgets[k];
  }
  if (sum != p.m || (p.strata == nullptr && p.k != 1)) return false;
  if (p.strata != nullptr && !InRange(p.strata, p.n, p.k)) return false;
  const int64_t opening =
      std::find_if(p.budgets, p.budgets + p.k, [](int64_t b) { return b > 0; }) - p.budgets;
  if (p.strata != nullptr && p.strata[p.first] != opening) return false;
  if (p.g == 0) return true;
  if (p.groups == nullptr || p.quotas == nullptr || !InRange(p.groups, p.n, p.g)) return false;
  std::vector<int64_t> sizes(p.g, 0);
  for (int64_t i = 0; i < p.n; ++i) ++sizes[p.groups[i]];
  int64_t capacity = 0;
  for (int64_t g = 0; g < p.g; ++g) {
    if (p.quotas[g] < 0) return false;
    capacity += std::min(p.quotas[g], sizes[g]);
  }
  return capacity >= p.m && p.quotas[p.groups[p.first]] > 0;
}

}  // namespace slap

#endif  // SLAP_SOUND_H_
