// Runs every CPU path over many shapes in buffers of exactly the promised size, for
// AddressSanitizer and UndefinedBehaviorSanitizer to watch, and checks that unsound arguments are
// refused unread. Build and run: python csrc/build.py --asan FILE && FILE
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../slap_fps.h"

namespace {

int failures = 0;

void Expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

struct Output {
  std::vector<int64_t> picks;
  std::vector<float> pick_squared;
  std::vector<float> squared;
  bool operator==(const Output& other) const {
    return picks == other.picks && pick_squared == other.pick_squared && squared == other.squared;
  }
};

// An owned problem: vectors have no slack that the sanitizer does not know of.
struct Case {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  std::vector<int64_t> budgets, strata, groups, quotas;
  SlapFpsProblem problem{};

  void Point() {
    problem.features = problem.bfloat16 ? static_cast<const void*>(narrow.data()) : wide.data();
    problem.budgets = budgets.data();
    problem.strata = strata.data();
    problem.groups = problem.g > 0 ? groups.data() : nullptr;
    problem.quotas = problem.g > 0 ? quotas.data() : nullptr;
  }
};

Case Make(int64_t n, int64_t d, int64_t k, bool bfloat16, bool across, bool quotas, bool duplicates,
          std::mt19937& random) {
  Case c;
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n * d; ++i) {
    const float value = duplicates ? static_cast<float>(random() % 2) : normal(random);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (bfloat16) {
      c.narrow.push_back(static_cast<uint16_t>(bits >> 16));
    } else {
      c.wide.push_back(value);
    }
  }
  std::vector<int64_t> sizes(k, 0);
  for (int64_t i = 0; i < n; ++i) {
    c.strata.push_back(static_cast<int64_t>(random() % k));
    ++sizes[c.strata.back()];
  }
  int64_t m = 0;
  for (int64_t s = 0; s < k; ++s) {
    c.budgets.push_back(quotas ? sizes[s] / 2 : (sizes[s] * 3 + 4) / 5);
    m += c.budgets.back();
  }
  if (m == 0) {
    c.budgets[c.strata[0]] = 1;
    m = 1;
  }
  int64_t opening = 0;
  while (c.budgets[opening] == 0) ++opening;
  int64_t first = 0;
  while (c.strata[first] != opening) ++first;
  c.problem = {n,        d,       k,       quotas ? 2 : 0, m,       first,  across,
               bfloat16, nullptr, nullptr, nullptr,        nullptr, nullptr};
  if (quotas) {  // one group is full long before the end
    for (int64_t i = 0; i < n; ++i) c.groups.push_back(i % 2);
    c.groups[first] = 0;
    c.quotas = {m / 4 + 1, n};
    int64_t in_second = 0;
    for (const int64_t g : c.groups) in_second += g;
    if (in_second + c.quotas[0] < m) c.quotas[0] = n;
  }
  return c;
}

int32_t Run(const Case& c, int32_t path, int32_t threads, int32_t block, Output* out) {
  out->picks.assign(c.problem.m, -1);
  out->pick_squared.assign(c.problem.m, -1.0f);
  out->squared.assign(c.problem.n, -1.0f);
  const SlapFpsOptions options = {path, threads, block};
  return slap_fps_cpu(&c.problem, &options, out->picks.data(), out->pick_squared.data(),
                      out->squared.data());
}

void RunShapes() {
  std::mt19937 random(7);
  const int64_t ns[] = {1, 2, 31, 32, 33, 150};
  const int64_t ds[] = {1, 3, 16, 17, 33, 64, 100, 513, 2100};
  int cases = 0;
  for (const int64_t n : ns) {
    for (const int64_t d : ds) {
      if (n * d > 20000) continue;  // the portable path is slow under the sanitizers
      for (int bits = 0; bits < 16; ++bits) {
        const int64_t k = bits % 3 + 1;
        Case c = Make(n, d, k, bits & 1, bits & 2, bits & 4, bits & 8, random);
        c.Point();
        Output reference, out;
        Expect(Run(c, SLAP_FPS_PORTABLE, 1, 7, &reference) == SLAP_FPS_OK, "portable runs");
        std::vector<char> seen(n, 0);
        for (const int64_t pick : reference.picks) {
          Expect(pick >= 0 && pick < n && !seen[pick], "picks are in range and distinct");
          if (pick >= 0 && pick < n) seen[pick] = 1;
        }
        for (int32_t path = SLAP_FPS_AVX2; path <= SLAP_FPS_VNNI; ++path) {
          if (!slap_fps_has_path(path)) continue;
          Expect(
              Run(c, path, 1 + bits % 2, bits % 5 == 0 ? 0 : 13 * (bits % 5), &out) == SLAP_FPS_OK,
              "a path runs");
          Expect(out == reference, "a path gives the bits of the portable one");
        }
        ++cases;
      }
    }
  }
  std::printf("%d shapes\n", cases);
}

void RunUnsound() {
  std::mt19937 random(8);
  const Case sound = Make(40, 20, 3, false, true, true, false, random);
  const auto refused = [&](const char* what, auto&& spoil) {
    Case c = sound;
    c.Point();
    spoil(c);
    Output out;
    if (c.problem.m < 0 || c.problem.m > 1000) c.problem.m = 1000;
    Expect(Run(c, SLAP_FPS_AUTO, 1, 0, &out) == SLAP_FPS_BAD_ARGUMENT, what);
  };
  refused("n = 0", [](Case& c) { c.problem.n = 0; });
  refused("d = 0", [](Case& c) { c.problem.d = 0; });
  refused("d too large", [](Case& c) { c.problem.d = 1 << 20; });
  refused("k = 0", [](Case& c) { c.problem.k = 0; });
  refused("g < 0", [](Case& c) { c.problem.g = -1; });
  refused("m over the budgets", [](Case& c) { ++c.problem.m; });
  refused("no features", [](Case& c) { c.problem.features = nullptr; });
  refused("no budgets", [](Case& c) { c.problem.budgets = nullptr; });
  refused("no strata for 3 budgets", [](Case& c) { c.problem.strata = nullptr; });
  refused("groups without ids", [](Case& c) { c.problem.groups = nullptr; });
  refused("first < 0", [](Case& c) { c.problem.first = -1; });
  refused("first = n", [](Case& c) { c.problem.first = c.problem.n; });
  refused("first in another stratum", [](Case& c) {
    while (c.strata[c.problem.first] == 0) ++c.problem.first;
  });
  refused("a stratum id = k", [](Case& c) { c.strata[39] = c.problem.k; });
  refused("a stratum id < 0", [](Case& c) { c.strata[39] = -1; });
  refused("a group id = g", [](Case& c) { c.groups[39] = c.problem.g; });
  refused("a budget < 0", [](Case& c) { c.budgets[0] = -1; });
  refused("a budget that overflows", [](Case& c) { c.budgets[0] = INT64_MAX; });
  refused("a quota < 0", [](Case& c) { c.quotas[0] = -1; });
  refused("quotas below the budgets", [](Case& c) { c.quotas = {1, 1}, c.Point(); });
  Case c = sound;
  c.Point();
  Output out;
  Expect(Run(c, SLAP_FPS_AUTO, 0, 0, &out) == SLAP_FPS_BAD_ARGUMENT, "threads = 0");
  Expect(Run(c, SLAP_FPS_AUTO, 1, 1, &out) == SLAP_FPS_BAD_ARGUMENT, "block = 1");
  Expect(Run(c, SLAP_FPS_AUTO, 1, 4096, &out) == SLAP_FPS_BAD_ARGUMENT, "block = 4096");
  Expect(Run(c, 9, 1, 0, &out) == SLAP_FPS_NO_SUCH_PATH, "path = 9");
}

}  // namespace

int main() {
  RunShapes();
  RunUnsound();
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
