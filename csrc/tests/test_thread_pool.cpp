// parallel(): each task once, many callers at once, nested calls, exceptions, and children of fork().
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "../cpu/thread_pool.h"
#include "check.h"

namespace fastdiff {
namespace tests {
namespace {

// The sanitizers' own allocators hold locks that a child of fork() inherits when other threads run.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// Plain ints: the sanitizer sees a task that runs twice, and a caller that returns before its tasks end.
void run_once(int threads, int64_t tasks) {
  std::vector<int> times(static_cast<size_t>(tasks));
  parallel(threads, tasks, [&](int64_t task) { times[task]++; });
  for (int64_t task = 0; task < tasks; task++) {
    EXPECT(times[task] == 1, "task ", task, " of ", tasks, " ran ", times[task], " times on ", threads, " threads");
  }
}

void each_task_runs_once() {
  for (const int threads : {-1, 0, 1, 2, 3, 8, 300}) {
    for (const int64_t tasks : {0, 1, 2, 3, 7, 64, 10000}) run_once(threads, tasks);
  }
  parallel(4, -5, [](int64_t) { EXPECT(false, "a task of none"); });
  for (int call = 0; call < 3000; call++) run_once(2 + call % 3, 1 + call % 5);
}

void many_callers_at_once() {
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 16; caller++) {
    callers.emplace_back([caller, &total] {
      Draws draws(static_cast<uint64_t>(caller));
      for (int call = 0; call < 300; call++) {
        const int64_t tasks = 1 + draws.below(40);
        std::vector<int64_t> squares(static_cast<size_t>(tasks));
        parallel(1 + static_cast<int>(draws.below(6)), tasks, [&](int64_t task) { squares[task] = task * task; });
        for (int64_t task = 0; task < tasks; task++) EXPECT(squares[task] == task * task, "caller ", caller);
        total += tasks;
        if (call % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // lets workers fall asleep
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT(total > 16 * 300, "tasks were lost");
}

void nested_calls() {
  std::vector<std::atomic<int>> times(6 * 5 * 4);
  for (int round = 1; round <= 20; round++) {
    parallel(4, 6, [&](int64_t a) {
      parallel(3, 5, [&](int64_t b) {
        parallel(2, 4, [&](int64_t c) { times[static_cast<size_t>((a * 5 + b) * 4 + c)]++; });
      });
    });
    for (const auto& count : times) EXPECT(count == round, "a nested task ran ", count, " times in ", round, " rounds");
  }
}

void exceptions_come_back() {
  for (int call = 0; call < 300; call++) {
    const int64_t bad = call % 17;
    std::string message;
    std::atomic<int> began{0};
    try {
      parallel(1 + call % 4, 17, [&](int64_t task) {
        began++;
        if (task == bad) throw std::runtime_error("task " + std::to_string(task));
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    EXPECT(message == "task " + std::to_string(bad), "got '", message, "'");
    EXPECT(began <= 17, "a task began twice");
    run_once(3, 9);  // the pool goes on
  }
  // every task throws, from many callers, through a nested call: each caller gets one of its own
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; caller++) {
    callers.emplace_back([caller] {
      for (int call = 0; call < 50; call++) {
        int got = -1;
        try {
          parallel(3, 4, [&](int64_t) { parallel(2, 3, [&](int64_t) { throw caller; }); });
        } catch (int thrown) {
          got = thrown;
        }
        EXPECT(got == caller, "caller ", caller, " got the exception of ", got);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// Ends this process with `failed` where the body does not end in time.
void in_a_child(const char* what, void (*body)()) {
  const pid_t child = fork();
  EXPECT(child >= 0, "fork");
  if (child == 0) {
    alarm(20);
    body();
    _exit(0);
  }
  int status = 0;
  EXPECT(waitpid(child, &status, 0) == child, "waitpid");
  EXPECT(!WIFSIGNALED(status), what, ": the child was ended by signal ", WTERMSIG(status), " (14: it hung)");
  EXPECT(WEXITSTATUS(status) == 0, what, ": the child failed");
}

void use() {
  for (int call = 0; call < 20; call++) run_once(4, 50);
}

void use_and_fork_again() {
  use();
  in_a_child("a grandchild", use);
  use();
}

void children_start_anew() {
  for (int round = 0; round < 20; round++) {
    use();
    in_a_child("a child of a parent whose pool is idle", use);
  }
  for (int round = 0; round < 5; round++) in_a_child("a child that forks", use_and_fork_again);
  if (kSanitized) return;
  std::atomic<bool> over{false};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; caller++) {
    callers.emplace_back([&] {
      while (!over) run_once(3, 20);
    });
  }
  for (int round = 0; round < 50; round++) in_a_child("a child of a parent whose pool is at work", use);
  over = true;
  for (std::thread& caller : callers) caller.join();
  use();
}

}  // namespace
}  // namespace tests
}  // namespace fastdiff

int main() {
  using namespace fastdiff::tests;
  const bool forks = std::getenv("FASTDIFF_EMULATED") == nullptr;  // qemu-user ends when a process with threads forks
  if (forks) in_a_child("a child of a parent that has no pool", use);
  each_task_runs_once();
  many_callers_at_once();
  nested_calls();
  exceptions_come_back();
  if (forks) children_start_anew();
  return 0;
}
