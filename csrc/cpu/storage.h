// What a selection on the CPU works on: aligned memory, rows of points, rows of picks in chunks.

#ifndef SLAP_CPU_STORAGE_H_
#define SLAP_CPU_STORAGE_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../slap_fps.h"
#include "kernels.h"

namespace slap {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Zeroed memory on a cache line: a vector that straddles two lines costs two loads.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) {
    const size_t bytes = (size * sizeof(T) + 127) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  T* get() const { return data_.get(); }
  T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  std::unique_ptr<T[], Free> data_;
};

inline int64_t RoundUp(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Row-major float32 rows, each readable up to a multiple of 16 values; the padding is 0 in all rows
// and adds fma(0, 0, acc) to a chain: nothing.
class Rows {
 public:
  explicit Rows(const SlapFpsProblem& p) : stride_(RoundUp(p.d, 16)) {
    const float* wide = static_cast<const float*>(p.features);
    if (!p.bfloat16 && stride_ == p.d) {
      data_ = wide;
      return;
    }
    copy_ = Buffer<float>(p.n * stride_);
    data_ = copy_.get();
    const uint16_t* narrow = static_cast<const uint16_t*>(p.features);
    for (int64_t i = 0; i < p.n; ++i) {
      float* row = copy_.get() + i * stride_;
      if (!p.bfloat16) {
        std::memcpy(row, wide + i * p.d, p.d * sizeof(float));
        continue;
      }
      uint32_t* bits = reinterpret_cast<uint32_t*>(row);
      for (int64_t c = 0; c < p.d; ++c) bits[c] = static_cast<uint32_t>(narrow[i * p.d + c]) << 16;
    }
  }
  const float* operator[](int64_t i) const { return data_ + i * stride_; }

 private:
  int64_t stride_;
  const float* data_;
  Buffer<float> copy_;
};

// Rows of 32-bit words, cut into chunks: what `accumulate` and `accumulate_int8` broadcast from.
template <typename Word>
class PickRows {
 public:
  PickRows(int64_t words, int most)
      : words_(words), most_(most), data_((words + kChunk - 1) / kChunk * most * kStride) {}
  void Set(int j, const void* row, uint32_t flip) {
    const char* bytes = static_cast<const char*>(row);
    for (int64_t c = 0; c < words_; c += kChunk) {
      Word* to = data_.get() + (c / kChunk * most_ + j) * kStride;
      std::memcpy(to, bytes + c * 4, std::min<int64_t>(kChunk, words_ - c) * 4);
      if (flip == 0) continue;
      uint32_t* flipped = reinterpret_cast<uint32_t*>(to);
      for (int64_t i = 0; i < std::min<int64_t>(kChunk, words_ - c); ++i) flipped[i] ^= flip;
    }
  }
  const Word* Chunk(int64_t c) const { return data_.get() + c / kChunk * most_ * kStride; }

 private:
  int64_t words_;
  int most_;
  Buffer<Word> data_;
};

// What one thread works in.
struct Scratch {
  explicit Scratch(int block) : panel(kChunk * kLanes), acc(block * kLanes), list(block * kLanes) {}
  Buffer<uint32_t> panel;
  Buffer<float> acc;  // (block, lanes); int32 while the filter runs
  Buffer<uint16_t> list;
};

}  // namespace slap

#endif  // SLAP_CPU_STORAGE_H_
