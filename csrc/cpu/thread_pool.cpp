#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "spin.h"

namespace fastdiff {
namespace {

// How long an idle worker looks for work before it sleeps, and a caller for the end before it does. To be woken takes 20
// to 60 us on a virtual machine, as long as a small call; looking any longer takes the processor from others.
constexpr std::chrono::microseconds kPatience{200};
constexpr int kMostWorkers = 255;

// Waits for `done` for a while. Between looks it gives way, so that on a busy machine others run meanwhile.
template <class Condition>
bool look_for(const Condition& done) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int look = 0; look < 32; look++) {
      if (done()) return true;
      pause();
    }
    sched_yield();
  } while (std::chrono::steady_clock::now() < until);
  return done();
}

// One call of parallel(); it lives on the caller's stack.
struct Job {
  const Task& run;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int> working{0};  // workers inside; changed under the pool's mutex
  int wanted;                   // workers that may still join; under the pool's mutex
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  // The caller's way with subnormal floats, which torch.set_flush_denormal changes for one thread: a worker takes it over,
  // or a row's bits would depend on who computes it.
  std::fenv_t mode;

  Job(const Task& run, int64_t tasks, int wanted) : run(run), tasks(tasks), wanted(wanted) { std::fegetenv(&mode); }

  void work() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (failed.load(std::memory_order_relaxed)) return;
      try {
        run(task);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    const bool one = job.wanted == 1;  // the workers count it down from here on
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int target = std::min(kMostWorkers, job.wanted);
      try {
        for (; workers_ < target; workers_++) std::thread(&Pool::loop, this).detach();
      } catch (const std::system_error&) {  // no more threads for this process: those that there are do the work
      }
      jobs_.push_back(&job);
      posted_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      if (one) {
        wake_.notify_one();
      } else {
        wake_.notify_all();
      }
    }
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);  // from here on nobody joins
      auto at = std::find(jobs_.begin(), jobs_.end(), &job);
      if (at != jobs_.end()) jobs_.erase(at);
    }
    if (!look_for([&] { return job.working.load(std::memory_order_acquire) == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, [&] { return job.working.load(std::memory_order_acquire) == 0; });
    }
  }

 private:
  void loop() {
    for (;;) {
      uint64_t seen = posted_.load(std::memory_order_acquire);
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        job = take();
        if (job == nullptr) seen = posted_.load(std::memory_order_relaxed);
      }
      if (job != nullptr) {
        std::fesetenv(&job->mode);
        job->work();
        std::lock_guard<std::mutex> lock(mutex_);
        if (job->working.fetch_sub(1, std::memory_order_release) == 1) left_.notify_all();
        continue;
      }
      if (look_for([&] { return posted_.load(std::memory_order_acquire) != seen; })) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  // A job to work on, or null; under the mutex.
  Job* take() {
    for (size_t i = 0; i < jobs_.size(); i++) {
      Job* job = jobs_[i];
      if (job->wanted == 0 || job->next.load(std::memory_order_relaxed) >= job->tasks) continue;
      job->wanted--;
      job->working.fetch_add(1, std::memory_order_relaxed);
      return job;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> posted_{0};
  std::atomic<int> asleep_{0};
  int workers_ = 0;
};

std::atomic<Pool*> current{nullptr};

// The workers of the parent do not exist in a child, and its mutex may have been held: the child starts anew. The old
// pool is given up on purpose, as is the pool of a process that ends: its sleeping workers still look at it.
void start_anew() { current.store(new Pool, std::memory_order_release); }

Pool& pool() {
  static const bool once = [] {
    start_anew();
    pthread_atfork(nullptr, nullptr, &start_anew);
    return true;
  }();
  (void)once;
  return *current.load(std::memory_order_acquire);
}

}  // namespace

void parallel(int threads, int64_t tasks, const Task& run) {
  if (tasks <= 0) return;
  if (threads <= 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; task++) run(task);
    return;
  }
  Job job(run, tasks, static_cast<int>(std::min<int64_t>(threads, tasks)) - 1);
  pool().run(job);
  if (job.failed.load()) std::rethrow_exception(job.error);
}

}  // namespace fastdiff
