// Threads that share a loop and never hold it up.
//
// An OpenMP region ends when its slowest thread has been scheduled, and its waiting threads spin:
// with 6 busy processes on 2 cores two threads took ten times as long as one. Here a helper that
// gets no processor takes no part: the caller works through the loop and waits only for iterations
// that others have begun, asleep. The helpers live as long as the call that uses them.
#ifndef SLAP_CPU_TEAM_H_
#define SLAP_CPU_TEAM_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace slap {

class Team {
 public:
  explicit Team(int size) : size_(size) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // Calls body(thread, i) for every i in [0, count), in any order; thread < size. `body` must not
  // throw.
  void For(int64_t count, bool share, const std::function<void(int, int64_t)>& body) {
    if (size_ == 1 || !share || count < 2) {
      for (int64_t i = 0; i < count; ++i) body(0, i);
      return;
    }
    Start();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      count_ = count;
      next_ = 0;
      ++loop_;
    }
    wake_.notify_all();
    Work(0, body);
    std::unique_lock<std::mutex> lock(mutex_);
    body_ = nullptr;  // nobody joins any more
    left_.wait(lock, [this] { return joined_ == 0; });
  }

 private:
  void Start() {
    if (!helpers_.empty()) return;
    try {
      for (int i = 1; i < size_; ++i) helpers_.emplace_back([this, i] { Help(i); });
    } catch (const std::system_error&) {
      // Fewer threads than asked for: slower, not wrong.
    }
    if (helpers_.empty()) size_ = 1;
  }

  void Work(int thread, const std::function<void(int, int64_t)>& body) {
    for (int64_t i = next_++; i < count_; i = next_++) body(thread, i);
  }

  void Help(int thread) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (body_ != nullptr && loop_ != seen); });
      if (stop_) return;
      seen = loop_;
      const std::function<void(int, int64_t)>& body = *body_;
      ++joined_;
      lock.unlock();
      Work(thread, body);
      lock.lock();
      if (--joined_ == 0) left_.notify_one();
    }
  }

  int size_;
  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  const std::function<void(int, int64_t)>* body_ = nullptr;
  int64_t loop_ = 0;
  int joined_ = 0;  // helpers inside the current loop
  bool stop_ = false;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace slap

#endif  // SLAP_CPU_TEAM_H_
