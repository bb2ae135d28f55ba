// Loops over tasks on several threads: helpers of our own, or those of torch's OpenMP.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace eacmoe {

// One loop: task(0) .. task(tasks - 1), each once. Every thread takes the next tasks when it is free.
struct Loop {
  void (*job)(const void*, int64_t);
  const void* context;
  int64_t tasks, grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < tasks;)
      for (int64_t i = first; i < first + grain && i < tasks; i++) job(context, i);
  }
};

// The caller and up to threads - 1 helpers. The caller waits only for helpers that have started, so one that the system
// has put to sleep delays nothing; OpenMP's threads wait for each other, which on a busy machine takes longer than the
// work. Idle helpers look for work for as long as the pauses of a decode step last, then sleep.
class Pool {
 public:
  void run(Loop& loop, int threads) {
    if (!busy_.try_lock()) return loop.work();  // another thread's call has the helpers
    start(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop, wanted_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0;
    }
    while (active_.load(std::memory_order_acquire)) std::this_thread::yield();
    busy_.unlock();
  }

 private:
  static constexpr std::chrono::microseconds AWAKE{300};

  void start(int helpers) {
    while (int(helpers_.size()) < helpers) {
      helpers_.emplace_back([this] { help(); });
      helpers_.back().detach();
    }
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
        for (int i = 0; i < 32 && generation_.load(std::memory_order_acquire) == seen; i++) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        }
        if (generation_.load(std::memory_order_acquire) == seen) std::this_thread::yield();  // to whoever needs the core
      }
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (wanted_ == 0) continue;
        wanted_--;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      loop_->work();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  int wanted_ = 0;
  Loop* loop_ = nullptr;
};

static long this_process() {
#if defined(__linux__) || defined(__APPLE__)
  return long(getpid());
#else
  return 0;
#endif
}

// The pool of this process: a fork has none of its parent's helpers. Never freed: helpers may outlive static objects.
static Pool& pool() {
  static std::mutex mutex;
  static Pool* own = nullptr;
  static long owner = -1;
  std::lock_guard<std::mutex> lock(mutex);
  if (const long process = this_process(); process != owner) own = new Pool, owner = process;
  return *own;
}

// `GOMP_parallel` of torch's OpenMP, which runs a function on each of its threads; or null. Where these threads spin
// for long, helpers of our own would fight them for the cores. A fork cannot use its parent's.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
static Parallel openmp = nullptr;
static long openmp_owner = -1;

template <class Task>
static void run(int64_t tasks, int threads, const Task& task) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  Loop loop;
  loop.job = [](const void* context, int64_t i) { (*(const Task*)context)(i); };
  loop.context = &task, loop.tasks = tasks;
  loop.grain = tasks / (threads * 16) + 1;  // neighbouring tasks read neighbouring memory
  if (openmp && this_process() == openmp_owner)
    openmp([](void* shared) { ((Loop*)shared)->work(); }, &loop, unsigned(threads), 0);
  else
    pool().run(loop, threads);
}

}  // namespace eacmoe
