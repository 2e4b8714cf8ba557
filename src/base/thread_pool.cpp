#include "base/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace octomoe {
namespace {

// Workers poll this often before they sleep: the phases of one forward follow each other within microseconds, and a
// futex wake-up costs about 30 us on a virtual machine.
constexpr int kSpins = 4000;

thread_local bool inside_loop = false;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int allowed_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int default_threads() {
  if (const char* text = std::getenv("OCTOMOE_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return n;
  }
  return allowed_cores();
}

struct ThreadPool::Impl {
  explicit Impl(int threads) : size(threads), pid(getpid()) {
    workers.reserve(static_cast<std::size_t>(size - 1));
    for (int t = 1; t < size; ++t) workers.emplace_back([this, t] { work(t); });
  }
  ~Impl() {
    if (getpid() != pid) {  // a forked child has no workers to join
      for (auto& w : workers) w.detach();
      return;
    }
    stop.store(true, std::memory_order_relaxed);
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    for (auto& w : workers) w.join();
  }

  void work(int thread) {
    inside_loop = true;
    std::uint32_t seen = 0;
    while (true) {
      std::uint32_t now = epoch.load(std::memory_order_acquire);
      for (int i = 0; now == seen && i < kSpins; ++i) {
        pause();
        now = epoch.load(std::memory_order_acquire);
      }
      if (now == seen) {
        epoch.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      if (stop.load(std::memory_order_relaxed)) return;
      drain(thread);
      if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) busy.notify_one();
    }
  }

  void drain(int thread) {
    try {
      for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        call(fn, i, thread);
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  void run(std::int64_t n, Call c, const void* f) {
    const std::lock_guard lock(run_mutex);
    call = c;
    fn = f;
    count = n;
    next.store(0, std::memory_order_relaxed);
    busy.store(size - 1, std::memory_order_relaxed);
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    inside_loop = true;
    drain(0);
    inside_loop = false;
    int left = busy.load(std::memory_order_acquire);
    for (int i = 0; left != 0; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        busy.wait(left, std::memory_order_acquire);
      }
      left = busy.load(std::memory_order_acquire);
    }
    if (error) {
      std::exception_ptr e;
      std::swap(e, error);
      std::rethrow_exception(e);
    }
  }

  const int size;
  const pid_t pid;
  std::vector<std::thread> workers;
  std::mutex run_mutex, error_mutex;
  std::exception_ptr error;
  Call call = nullptr;
  const void* fn = nullptr;
  std::int64_t count = 0;
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<std::uint32_t> epoch{0};
  alignas(64) std::atomic<int> busy{0};
  std::atomic<bool> stop{false};
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>(threads > 0 ? threads : default_threads())) {}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const { return impl_->size; }

void ThreadPool::run(std::int64_t count, Call call, const void* fn) {
  if (count <= 0) return;
  // One index, one thread, a loop inside a loop, or a forked child (whose workers do not exist): run here.
  if (count == 1 || impl_->size == 1 || inside_loop || getpid() != impl_->pid) {
    for (std::int64_t i = 0; i < count; ++i) call(fn, i, 0);
    return;
  }
  impl_->run(count, call, fn);
}

ThreadPool& ThreadPool::shared(int threads) {
  static std::mutex mutex;
  // Never destroyed: worker threads must not be joined while static objects of other libraries go away.
  static auto* pools = new std::map<int, std::unique_ptr<ThreadPool>>;
  const int n = threads > 0 ? threads : default_threads();
  const std::lock_guard lock(mutex);
  auto& pool = (*pools)[n];
  if (!pool) pool = std::make_unique<ThreadPool>(n);
  return *pool;
}

}  // namespace octomoe
