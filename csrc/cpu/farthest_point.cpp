// Farthest-point selection on the CPU: blocked lazy greedy ("pool"), the same bits on every path.
//
// A round takes the `block` points that are farthest from the picks so far, runs the exact greedy
// selection on them alone, and stops as soon as the best of them is beaten, by value and then by
// index, by the best point outside. Distances only shrink, so until then no outside point can be
// the greedy pick. One pass then applies all picks of the round to all points: as a blocked kernel,
// where a pass a pick would be bound by memory.
//
// Parallel loops hand out panels of 32 points; a point's distance is computed by one thread in one
// order, so the number of threads changes nothing.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <new>
#include <vector>

#include "../slap_fps.h"
#include "../sound.h"
#include "kernels.h"
#include "paths.h"
#include "storage.h"
#include "team.h"

namespace slap {
namespace {

constexpr int kMaxBlock = 1024;
// Below this many pair-dimensions (some 50 us of one core) a pass is not worth waking threads for.
constexpr int64_t kParallelWork = 1 << 22;
// The filter's fixed cost (packing, bounds) needs rows of some length to pay.
constexpr int64_t kFilterDimensions = 32;
// Norms above this could overflow in the filter's bound; no such pair is filtered.
constexpr float kFilterNorm = 1e36f;

// A larger pool means fewer passes over all points and more work inside the pool: measured optima.
int DefaultBlock(int64_t n) { return n <= 2048 ? 64 : 128; }

// The sign bit is clear in all of them but -1, so floats order like their bits.
uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Larger is picked first: the larger distance, then the lower index.
uint64_t Key(float squared, int32_t index) {
  return static_cast<uint64_t>(Bits(squared)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

int32_t KeyIndex(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

class Selection {
 public:
  Selection(const SlapFpsProblem& problem, const Kernels& kernels, int threads, int block)
      : p_(problem),
        kernels_(kernels),
        team_(threads),
        block_(block),
        pool_size_(std::min(kLanes, block)),
        rows_(problem),
        squared_(problem.n, std::numeric_limits<float>::infinity()),
        left_in_(problem.quotas, problem.quotas + problem.g),
        pick_rows_(problem.d, block),
        pairs_(static_cast<size_t>(RoundUp(block, kLanes)) * block),
        pool_bits_(RoundUp(block, kLanes)) {
    for (int i = 0; i < threads; ++i) scratch_.emplace_back(block);
    if (kernels.quantise != nullptr && p_.d >= kFilterDimensions) Quantise();
  }

  void Run(int64_t* picks, float* pick_squared, float* squared) {
    std::vector<std::vector<int32_t>> unpicked(p_.k);  // by stratum, ascending
    for (int64_t i = 0; i < p_.n; ++i) {
      unpicked[p_.strata == nullptr ? 0 : p_.strata[i]].push_back(static_cast<int32_t>(i));
    }
    std::vector<int64_t> left(p_.budgets, p_.budgets + p_.k);
    int64_t stratum = 0;
    for (int64_t done = 0; done < p_.m;) {
      const bool any = left[stratum] > 0 && FindPool(unpicked[stratum], done == 0);
      if (!any) {  // what a stratum cannot fill, the next one may
        const int64_t spare = left[stratum];
        left[stratum] = 0;
        stratum = (stratum + 1) % p_.k;
        left[stratum] += spare;
        continue;
      }
      Greedy(left[stratum]);
      for (size_t i = 0; i < new_.size(); ++i) {
        picks[done] = new_[i];
        pick_squared[done++] = new_squared_[i];
        squared_[new_[i]] = -1.0f;
      }
      left[stratum] -= static_cast<int64_t>(new_.size());
      // The first rounds are short, as one pick shrinks many distances: they need no large pool.
      pool_size_ = std::clamp(4 * static_cast<int>(new_.size()), std::min(kLanes, block_), block_);
      std::vector<int32_t>& rest = unpicked[stratum];
      rest.erase(std::remove_if(rest.begin(), rest.end(),
                                [this](int32_t i) { return squared_[i] < 0.0f; }),
                 rest.end());

      targets_.clear();  // a distance of 0 cannot shrink
      for (int64_t s = p_.across_strata ? 0 : stratum; s < (p_.across_strata ? p_.k : stratum + 1);
           ++s) {
        std::copy_if(unpicked[s].begin(), unpicked[s].end(), std::back_inserter(targets_),
                     [this](int32_t i) { return squared_[i] > 0.0f; });
      }
      ShrinkTargets();
    }
    for (int64_t i = 0; i < p_.n; ++i) squared[i] = std::max(squared_[i], 0.0f);
  }

 private:
  bool IsOpen(int32_t i) const { return p_.g == 0 || left_in_[p_.groups[i]] > 0; }

  // Fills pool_ (ascending) with the farthest open points of a stratum and beyond_ with the key of
  // the best point left out; false where no point is open.
  bool FindPool(const std::vector<int32_t>& candidates, bool opening) {
    pool_.clear();
    beyond_ = 0;
    if (opening) {
      pool_.push_back(static_cast<int32_t>(p_.first));
      return true;
    }
    keys_.clear();
    for (const int32_t i : candidates) {
      if (IsOpen(i)) keys_.push_back(Key(squared_[i], i));
    }
    if (static_cast<int64_t>(keys_.size()) > pool_size_) {
      std::nth_element(keys_.begin(), keys_.begin() + pool_size_, keys_.end(),
                       std::greater<uint64_t>());
      beyond_ = keys_[pool_size_];
      keys_.resize(pool_size_);
    }
    for (const uint64_t key : keys_) pool_.push_back(KeyIndex(key));
    std::sort(pool_.begin(), pool_.end());
    return !pool_.empty();
  }

  // Picks inside the pool until it is beaten from outside, a group is full, or `most` are picked.
  void Greedy(int64_t most) {
    const int size = static_cast<int>(pool_.size());
    const int panels = (size + kLanes - 1) / kLanes;
    const int32_t taken = static_cast<int32_t>(Bits(-1.0f));
    int32_t* current = pool_bits_.get();
    int32_t best = taken;
    for (int j = 0; j < panels * kLanes; ++j) {
      current[j] = j < size ? static_cast<int32_t>(Bits(squared_[pool_[j]])) : taken;
      best = std::max(best, current[j]);
    }
    new_.clear();
    new_squared_.clear();
    // Where all distances are 0, or one pick is asked for, no distance inside the pool matters.
    const bool flat = best == 0 || size == 1 || most == 1;
    if (!flat) PoolDistances(panels, size);
    while (best != taken && static_cast<int64_t>(new_.size()) < most) {
      const int at = static_cast<int>(std::find(current, current + size, best) - current);
      const int32_t pick = pool_[at];
      const float value = FromBits(best);
      if (!new_.empty() && Key(value, pick) < beyond_) break;
      new_.push_back(pick);
      new_squared_.push_back(value);
      best = taken;
      for (int q = 0; q < panels && !flat; ++q) {
        const int32_t* row = reinterpret_cast<const int32_t*>(PoolPanel(q)) + at * kLanes;
        int32_t* lanes = current + q * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = row[lane] < lanes[lane] ? row[lane] : lanes[lane];
        }
      }
      current[at] = taken;
      for (int j = 0; j < panels * kLanes; ++j) best = current[j] > best ? current[j] : best;
      if (p_.g != 0 && --left_in_[p_.groups[pick]] == 0) break;
    }
  }

  float* PoolPanel(int q) const { return pairs_.get() + static_cast<int64_t>(q) * kLanes * block_; }

  // PoolPanel(q)[i][lane] = squared distance of pool points i and 32 q + lane. Only the upper
  // triangle is computed: t and -t have the same square.
  void PoolDistances(int panels, int size) {
    for (int j = 0; j < size; ++j) pick_rows_.Set(j, rows_[pool_[j]], 0);
    const int64_t work = static_cast<int64_t>(size) * size * p_.d / 2;
    team_.For(panels, work > kParallelWork, [&](int thread, int64_t task) {
      const int q = panels - 1 - static_cast<int>(task);  // the longest first
      Distances(scratch_[thread], pool_.data(), size, q, std::min(size, (q + 1) * kLanes),
                PoolPanel(q));
    });
    for (int q = 0; q < panels; ++q) {
      for (int i = (q + 1) * kLanes; i < size; ++i) {
        const float* mirrored = PoolPanel(i / kLanes) + q * kLanes * kLanes + i % kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
          PoolPanel(q)[i * kLanes + lane] = mirrored[lane * kLanes];
        }
      }
    }
  }

  // acc[j][lane] = squared distance of pick row j < count and point 32 q + lane of `points`; lanes
  // past the end repeat the last point.
  void Distances(Scratch& scratch, const int32_t* points, int64_t size, int64_t q, int count,
                 float* acc) const {
    std::memset(acc, 0, sizeof(float) * count * kLanes);
    for (int64_t c = 0; c < p_.d; c += kChunk) {
      const uint32_t* lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const float* row = rows_[points[std::min<int64_t>(q * kLanes + lane, size - 1)]];
        lanes[lane] = reinterpret_cast<const uint32_t*>(row + c);
      }
      const int words = static_cast<int>(std::min<int64_t>(kChunk, p_.d - c));
      kernels_.pack(lanes, static_cast<int>(RoundUp(words, 16)), scratch.panel.get());
      kernels_.accumulate(reinterpret_cast<const float*>(scratch.panel.get()), pick_rows_.Chunk(c),
                          words, count, acc);
    }
  }

  // Applies the round's picks to all targets.
  void ShrinkTargets() {
    const int count = static_cast<int>(new_.size());
    const int64_t size = static_cast<int64_t>(targets_.size());
    for (int j = 0; j < count; ++j) pick_rows_.Set(j, rows_[new_[j]], 0);
    // A first pick shrinks every distance; after a round that the bound could not tell apart, it
    // rests.
    const bool filter = has_filter_ && !filter_rests_ && std::isfinite(new_squared_[0]);
    filter_rests_ = false;
    if (filter) {
      for (int j = 0; j < count; ++j) {
        pick_q_.Set(j, q_.get() + new_[j] * q_stride_, 0x80808080u);  // unsigned + 128 to signed
        pick_bounds_[j] = bounds_[new_[j]];
      }
    }
    std::atomic<int64_t> suspects{0};
    const bool share = size * count * p_.d > kParallelWork;
    team_.For((size + kLanes - 1) / kLanes, share, [&](int thread, int64_t q) {
      Scratch& scratch = scratch_[thread];
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, size - q * kLanes));
      const int32_t* points = targets_.data() + q * kLanes;
      if (filter) {
        const int found = FindSuspects(scratch, points, lanes, count);
        suspects += found;
        if (found <= lanes * count / 4) {  // beyond that the tile is cheaper than the pairs
          ShrinkSuspects(scratch, points, found);
          return;
        }
      }
      float current[kLanes] = {};
      for (int lane = 0; lane < lanes; ++lane) current[lane] = squared_[points[lane]];
      Distances(scratch, targets_.data(), size, q, count, scratch.acc.get());
      kernels_.shrink(scratch.acc.get(), count, current);
      for (int lane = 0; lane < lanes; ++lane) squared_[points[lane]] = current[lane];
    });
    filter_rests_ = filter && suspects > size * count / 3;
  }

  int FindSuspects(Scratch& scratch, const int32_t* points, int lanes, int count) const {
    LaneBounds bounds;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Quantised& q = bounds_[points[std::min(lane, lanes - 1)]];
      const float squared = squared_[points[std::min(lane, lanes - 1)]];
      bounds.scale[lane] = -2.0f * q.scale;
      bounds.norm[lane] = lane < lanes ? q.norm : 1e38f;  // a missing lane is never a suspect
      // The chain may come out below the true square by a factor of (1 - 2^-24)^(d + 3).
      const double slack = 1.0 + (p_.d + 32) * 0x1p-24;
      const double reach = (__builtin_sqrt(squared) + q.rest) * slack;
      bounds.reach[lane] = lane < lanes ? static_cast<float>(reach) : 0.0f;
    }
    int32_t* acc = reinterpret_cast<int32_t*>(scratch.acc.get());
    for (int j = 0; j < count; ++j) {
      std::fill_n(acc + j * kLanes, kLanes, pick_bounds_[j].shift);
    }
    const int64_t q_words = (p_.d + 3) / 4;
    for (int64_t c = 0; c < q_words; c += kChunk) {
      const uint32_t* rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t* row = q_.get() + points[std::min(lane, lanes - 1)] * q_stride_;
        rows[lane] = reinterpret_cast<const uint32_t*>(row) + c;
      }
      const int words = static_cast<int>(std::min<int64_t>(kChunk, q_words - c));
      kernels_.pack(rows, static_cast<int>(RoundUp(words, 16)), scratch.panel.get());
      kernels_.accumulate_int8(scratch.panel.get(), pick_q_.Chunk(c), words, count, acc);
    }
    return kernels_.suspects(acc, pick_bounds_.data(), count, &bounds, scratch.list.get());
  }

  void ShrinkSuspects(Scratch& scratch, const int32_t* points, int found) {
    for (int begin = 0; begin < found; begin += kPairs) {
      const float *a[kPairs], *b[kPairs];
      float out[kPairs];
      const int size = std::min(kPairs, found - begin);
      for (int i = 0; i < kPairs; ++i) {
        const int pair = scratch.list[begin + std::min(i, size - 1)];
        a[i] = rows_[points[pair & (kLanes - 1)]];
        b[i] = rows_[new_[pair >> 5]];
      }
      kernels_.pairs(a, b, p_.d, out);
      for (int i = 0; i < size; ++i) {
        float& current = squared_[points[scratch.list[begin + i] & (kLanes - 1)]];
        current = std::min(current, out[i]);
      }
    }
  }

  void Quantise() {
    q_stride_ = RoundUp(p_.d, 64);
    q_ = Buffer<uint8_t>(p_.n * q_stride_);
    bounds_.resize(p_.n);
    pick_bounds_.resize(block_);
    pick_q_ = PickRows<int32_t>((p_.d + 3) / 4, block_);
    // Any centre is right; the mean of some rows keeps a common offset out of the 8 bits.
    const int64_t step = std::max<int64_t>(1, p_.n / 256);
    const float share = 1.0f / static_cast<float>((p_.n + step - 1) / step);
    std::vector<float> centre(RoundUp(p_.d, 16), 0.0f);
    for (int64_t i = 0; i < p_.n; i += step) {
      for (int64_t c = 0; c < p_.d; ++c) centre[c] += rows_[i][c] * share;
    }
    team_.For((p_.n + kLanes - 1) / kLanes, p_.n * p_.d > kParallelWork, [&](int, int64_t panel) {
      for (int64_t i = panel * kLanes; i < std::min(p_.n, (panel + 1) * kLanes); ++i) {
        bounds_[i] = kernels_.quantise(rows_[i], centre.data(), p_.d, q_.get() + i * q_stride_);
      }
    });
    has_filter_ = std::all_of(bounds_.begin(), bounds_.end(),
                              [](const Quantised& q) { return q.norm < kFilterNorm; });
  }

  const SlapFpsProblem& p_;
  const Kernels& kernels_;
  Team team_;
  const int block_;  // the largest pool
  int pool_size_;
  const Rows rows_;
  std::vector<float> squared_;  // -1: picked
  std::vector<int64_t> left_in_;   // picks left, by group
  std::vector<Scratch> scratch_;

  std::vector<uint64_t> keys_;
  std::vector<int32_t> pool_;
  uint64_t beyond_ = 0;
  std::vector<int32_t> new_;
  std::vector<float> new_squared_;
  std::vector<int32_t> targets_;
  PickRows<float> pick_rows_;
  Buffer<float> pairs_;
  Buffer<int32_t> pool_bits_;

  bool has_filter_ = false;
  bool filter_rests_ = false;
  int64_t q_stride_ = 0;
  Buffer<uint8_t> q_;
  std::vector<Quantised> bounds_;
  std::vector<Quantised> pick_bounds_;
  PickRows<int32_t> pick_q_{0, 0};
};

}  // namespace
}  // namespace slap

extern "C" {

int32_t slap_fps_abi(void) { return SLAP_FPS_ABI; }

int32_t slap_fps_has_path(int32_t path) { return slap::Supports(path) ? 1 : 0; }

int32_t slap_fps_auto_path(void) {
  static const int32_t path = slap::MeasureAutoPath();
  return path;
}

int32_t slap_fps_cpu(const SlapFpsProblem* problem, const SlapFpsOptions* options, int64_t* picks,
                     float* pick_squared, float* squared) {
  const int block = options->block == 0 ? slap::DefaultBlock(problem->n) : options->block;
  if (options->threads < 1 || block < 2 || block > slap::kMaxBlock) return SLAP_FPS_BAD_ARGUMENT;
  const int32_t path = options->path == SLAP_FPS_AUTO ? slap_fps_auto_path() : options->path;
  if (!slap::Supports(path)) return SLAP_FPS_NO_SUCH_PATH;
  try {
    if (!slap::IsSound(*problem)) return SLAP_FPS_BAD_ARGUMENT;
    slap::Selection selection(*problem, *slap::KernelsOf(path), options->threads, block);
    selection.Run(picks, pick_squared, squared);
  } catch (const std::bad_alloc&) {
    return SLAP_FPS_NO_MEMORY;
  }
  return SLAP_FPS_OK;
}

}  // extern "C"
