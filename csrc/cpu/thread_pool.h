// parallel(): tasks 0 .. n-1 over the threads of one pool.
//
// A pool of our own rather than OpenMP's: after fork() a child of a process that has used GNU's OpenMP hangs in its
// first parallel region, every calling thread gets a team of its own there, and teams spin between regions. Here any
// number of threads may call at once and share the workers; the caller always works, so a call never waits for a free
// worker; idle workers sleep; a child starts with a fresh pool.
#pragma once

#include <cstdint>

namespace fastdiff {

// A reference to a callable void(int64_t task) that outlives the call.
class Task {
 public:
  template <class Function>
  Task(const Function& function)  // NOLINT: implicit, so that a lambda can be handed over
      : object_(&function), call_([](const void* object, int64_t task) { (*static_cast<const Function*>(object))(task); }) {}
  void operator()(int64_t task) const { call_(object_, task); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t);
};

// Runs run(0) .. run(tasks - 1), each once, on the calling thread and up to threads - 1 others, in any order; returns
// when all are done. The first exception is thrown here, after the tasks that had begun; the rest are skipped.
void parallel(int threads, int64_t tasks, const Task& run);

}  // namespace fastdiff
