// A pool that runs one loop at a time over a fixed set of threads. It decides only who runs an index, never what is
// computed, so results cannot depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace octomoe {

class ThreadPool {
 public:
  // threads <= 0: OCTOMOE_NUM_THREADS if set, else the cores this process may run on.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls fn(index, thread) for index in [0, count), thread in [0, threads()). Indices are handed out one after
  // another, so put the largest work first. Returns when all are done; the first exception thrown is rethrown here (the
  // rest of the loop is skipped). Not allocating. Calls from several threads are serialised; a call from inside fn runs
  // inline.
  template <class Fn>
  void parallel_for(std::int64_t count, const Fn& fn) {
    run(
        count, [](const void* f, std::int64_t i, int t) { (*static_cast<const Fn*>(f))(i, t); }, &fn);
  }

  // A shared pool for load-time work (quantising, reading), made on first use.
  static ThreadPool& shared(int threads = 0);

 private:
  using Call = void (*)(const void*, std::int64_t, int);
  void run(std::int64_t count, Call call, const void* fn);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

int default_threads();

}  // namespace octomoe
