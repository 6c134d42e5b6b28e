// Runs the kernels of csrc/cuda/ without PyTorch, whose allocator would hide accesses past the end,
// for compute-sanitizer to watch: every buffer is an allocation of its own, of exactly the promised
// size, between red zones of bytes that nobody may touch. The picks are held to a plain greedy
// loop. Build and run:
//
//   python csrc/build.py --device FILE && compute-sanitizer --tool memcheck FILE
//
// Without nvcc, --device builds it with the kernels emulated; tests/ops/test_csrc.py runs that.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../cuda/farthest_point.cu"

namespace {

constexpr size_t kZone = 1024;
constexpr unsigned char kMark = 0xa5;
int failures = 0;

void Expect(bool ok, const char* what, const char* name) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s: %s\n", name, what);
  ++failures;
}

void Must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "FAILED: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(EXIT_FAILURE);
}

// Memory of the device between two red zones; `shift` bytes off the alignment of an allocation.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t shift = 0) : bytes_(bytes), before_(kZone + shift) {
    const std::vector<unsigned char> marks(before_ + bytes + kZone, kMark);
    Must(cudaMalloc(&base_, marks.size()), "cudaMalloc");
    Must(cudaMemcpy(base_, marks.data(), marks.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(base_); }
  void* data() const { return static_cast<char*>(base_) + before_; }
  void Fill(const void* from) {
    Must(cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  template <typename T>
  std::vector<T> Read() const {
    std::vector<T> to(bytes_ / sizeof(T));
    Must(cudaMemcpy(to.data(), data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  }
  bool ZonesAreWhole() const {
    std::vector<unsigned char> all(before_ + bytes_ + kZone);
    Must(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (size_t i = 0; i < all.size(); ++i) {
      if ((i < before_ || i >= before_ + bytes_) && all[i] != kMark) return false;
    }
    return true;
  }

 private:
  size_t bytes_, before_;
  void* base_ = nullptr;
};

struct Shape {
  const char* name;
  int64_t n, d, k;
  bool bfloat16, across, quotas, duplicates, shifted;
};

constexpr Shape kShapes[] = {
    {"one point", 1, 1, 1, false, true, false, false, false},
    {"narrow rows", 131, 33, 1, false, true, false, false, false},
    {"read in place", 300, 64, 1, false, true, false, false, false},
    {"off alignment", 300, 64, 1, false, true, false, false, true},
    {"bfloat16, filtered", 500, 130, 1, true, true, false, false, false},
    {"strata and quotas", 420, 70, 5, false, true, true, false, false},
    {"strata apart", 400, 100, 3, true, false, false, false, false},
    {"duplicates", 260, 96, 2, false, true, true, true, false},
};

struct Case {
  std::vector<float> rows;  // (n, d) as the kernels see them
  std::vector<uint16_t> short_rows;
  std::vector<int64_t> strata, groups, budgets, quotas;
  SlapFpsProblem problem{};
};

Case Make(const Shape& shape) {
  Case c;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < shape.n * shape.d; ++i) {
    float value = shape.duplicates ? static_cast<float>(random() % 2) : normal(random);
    if (shape.bfloat16) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      c.short_rows.push_back(static_cast<uint16_t>(bits >> 16));
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, sizeof value);
    }
    c.rows.push_back(value);
  }
  int64_t m = 0;
  for (int64_t i = 0; i < shape.n; ++i) c.strata.push_back(i % shape.k);
  for (int64_t s = 0; s < shape.k; ++s) {
    c.budgets.push_back((shape.n / shape.k * 3 + 4) / 5);
    m += c.budgets.back();
  }
  if (shape.quotas) {  // the first group is full long before the end
    for (int64_t i = 0; i < shape.n; ++i) c.groups.push_back(i / shape.k % 2);
    c.quotas = {m / 3, shape.n};
    m -= m - std::min(m, c.quotas[0] + shape.n / 2 - shape.k);
    int64_t sum = 0;
    for (int64_t& budget : c.budgets) sum += budget = m / shape.k;
    m = sum;
  }
  c.problem = {shape.n,
               shape.d,
               shape.k,
               shape.quotas ? 2 : 0,
               m,
               0,
               shape.across,
               shape.bfloat16,
               nullptr,
               c.budgets.data(),
               c.strata.data(),
               shape.quotas ? c.groups.data() : nullptr,
               shape.quotas ? c.quotas.data() : nullptr};
  return c;
}

struct Picks {
  std::vector<int64_t> picks;
  std::vector<float> at, squared;
};

// A pass over all points a pick, as slap_ds/ops/reference.py has it.
Picks PlainGreedy(const Case& c) {
  const SlapFpsProblem& p = c.problem;
  Picks out;
  out.squared.assign(p.n, INFINITY);
  std::vector<char> taken(p.n, 0);
  std::vector<int64_t> left(c.budgets), remaining(c.quotas);
  for (int64_t s = 0; static_cast<int64_t>(out.picks.size()) < p.m;) {
    int64_t best = -1;
    for (int64_t i = 0; i < p.n && left[s] > 0; ++i) {
      if (taken[i] || c.strata[i] != s || (p.g > 0 && remaining[c.groups[i]] == 0)) continue;
      if (best < 0 || out.squared[i] > out.squared[best]) best = i;
    }
    if (best < 0) {
      left[(s + 1) % p.k] += left[s];
      left[s] = p.k == 1 ? left[s] : 0;
      s = (s + 1) % p.k;
      continue;
    }
    out.picks.push_back(best);
    out.at.push_back(out.squared[best]);
    taken[best] = 1;
    --left[s];
    if (p.g > 0) --remaining[c.groups[best]];
    for (int64_t i = 0; i < p.n; ++i) {
      if (!p.across_strata && c.strata[i] != s) continue;
      float sum = 0.0f;
      for (int64_t d = 0; d < p.d; ++d) {
        const float t = c.rows[i * p.d + d] - c.rows[best * p.d + d];
        sum = std::fma(t, t, sum);
      }
      out.squared[i] = std::min(out.squared[i], sum);
    }
  }
  for (int64_t i = 0; i < p.n; ++i) out.squared[i] = taken[i] ? 0.0f : out.squared[i];
  return out;
}

void Run(const Shape& shape) {
  Case c = Make(shape);
  const SlapFpsProblem& p = c.problem;
  const size_t value = shape.bfloat16 ? sizeof(uint16_t) : sizeof(float);
  Buffer features(p.n * p.d * value, shape.shifted ? 4 : 0);
  features.Fill(shape.bfloat16 ? static_cast<const void*>(c.short_rows.data()) : c.rows.data());
  c.problem.features = features.data();
  Buffer workspace(slap_fps_cuda_workspace(&p)), picks(p.m * 8), at(p.m * 4), squared(p.n * 4);
  const int32_t status =
      slap_fps_cuda(&p, 0, nullptr, workspace.data(), static_cast<int64_t*>(picks.data()),
                    static_cast<float*>(at.data()), static_cast<float*>(squared.data()));
  Expect(status == SLAP_FPS_OK, slap_fps_cuda_error(), shape.name);
  if (status != SLAP_FPS_OK) return;
  Must(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  const Picks expected = PlainGreedy(c);
  Expect(picks.Read<int64_t>() == expected.picks, "the picks differ", shape.name);
  Expect(at.Read<float>() == expected.at, "the distances of the picks differ", shape.name);
  Expect(squared.Read<float>() == expected.squared, "the distances differ", shape.name);
  for (const Buffer* buffer : {&features, &workspace, &picks, &at, &squared}) {
    Expect(buffer->ZonesAreWhole(), "something was written outside a buffer", shape.name);
  }
}

}  // namespace

int main() {
  for (const Shape& shape : kShapes) Run(shape);
  std::printf("%zu shapes\n", sizeof kShapes / sizeof kShapes[0]);
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
