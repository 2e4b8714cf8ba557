#include "emulator/machine.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "emulator/cuda.h"
#include "emulator/fiber.h"

namespace {
constexpr int kCanaryBytes = 1024;
constexpr int kArrayBytes = octomoe::emulator::kMaxSharedBytes + kCanaryBytes;
}  // namespace
namespace octomoe::sm80 {
alignas(1024) constinit thread_local std::uint8_t shared[kArrayBytes];
}  // namespace octomoe::sm80
namespace octomoe::sm90 {
alignas(1024) constinit thread_local std::uint8_t memory[kArrayBytes];
}  // namespace octomoe::sm90
namespace octomoe::kernels {
alignas(1024) constinit thread_local float shared_floats[kArrayBytes / 4];
}  // namespace octomoe::kernels

OctomoeDim3 threadIdx, blockIdx, gridDim, blockDim;

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl octomoe_switch_stack
.hidden octomoe_switch_stack
.type octomoe_switch_stack, @function
octomoe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size octomoe_switch_stack, . - octomoe_switch_stack
)");
#endif

namespace octomoe::emulator {
namespace {

constexpr std::uint8_t kGarbage = 0xd5, kCanary = 0x5e;
constexpr std::int32_t kNoSumYet = 0x3badbad3;
// Static shared memory (sm80's barriers) lies somewhere beside dynamic memory; nothing but its addresses is known.
constexpr std::uint32_t kStaticAddress = 1u << 28;
thread_local std::uint8_t static_anchor;

// A thread goes on when (*word & mask) != blocked.
struct Wait {
  const std::uint32_t* word = nullptr;
  std::uint32_t mask = 0, blocked = 1;
  const char* what = "nothing";
  std::uint32_t detail = 0;
};
constexpr std::uint32_t kNothing = 0;
constexpr Wait kGoOn{&kNothing, 0, 1, "nothing", 0};

struct CpAsync {
  std::uint32_t shared, bytes;
  const void* global;  // null: zeros
  std::uint32_t group;
  bool arrives;  // at the barrier `shared`, when all before it have landed
};
struct Product {
  std::int32_t* sums;
  int tokens;
  std::uint64_t a, b;
  bool accumulate;
  std::uint32_t group;
};
struct Thread {
  Fiber fiber;
  unsigned index = 0;
  Wait wait = kGoOn;
  bool done = false;
  std::uint32_t rests_in = 0;  // the round in which it lets others run
  std::deque<CpAsync> copies;
  std::uint32_t copy_group = 0, arrivals_due = 0;
  std::deque<Product> products;
  std::uint32_t product_group = 0;
};
struct Warp {
  LaneValues values[2][32];
  std::uint32_t generation = 0, arrived = 0;
  const char* instruction = nullptr;
};
struct NamedBarrier {
  std::uint32_t generation = 0;
  int arrived = 0, threads = 0;
};
struct Mbarrier {
  std::uint32_t phase = 0;
  int count = 0, pending = 0;
  std::int64_t bytes = 0;
};
struct Cta;
// A bulk copy: pieces of rows, all into the same places of some CTAs.
struct Piece {
  std::uint32_t shared, bytes;
  const std::uint8_t* global;  // null: zeros
};
struct BulkCopy {
  std::vector<Piece> pieces;
  std::uint32_t barrier = 0, bytes = 0, cta_mask = 1;
};

struct Cluster;
struct Cta {
  Cluster* cluster = nullptr;
  std::uint32_t rank = 0;
  unsigned block = 0;
  std::vector<Thread> threads;
  std::vector<std::uint32_t> order;
  std::uint32_t round = 0;
  bool waited = false;  // for the launch before
  std::vector<Warp> warps;
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<std::uint32_t, Mbarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  std::uint8_t* dynamic = nullptr;  // which of the arrays above the kernel uses
  std::uint8_t* anchor = nullptr;
  std::vector<std::uint8_t> engine_view;  // dynamic memory as wgmma sees it
  std::vector<std::pair<std::uint32_t, std::uint32_t>> unfenced;
  std::exception_ptr fault;
  std::size_t left = 0;
};
struct Cluster {
  const Launch* launch = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<Cta> ctas;
  NamedBarrier barrier;
  std::mt19937 random;
  // Whose turn it is, and how many turns in a row have moved nothing.
  std::mutex mutex;
  std::condition_variable turned;
  std::size_t turn = 0, idle = 0, ended = 0;
  bool failed = false;
};

// Of the thread that runs: one at a time in the whole process.
Cta* cta = nullptr;
Thread* thread = nullptr;

[[noreturn]] void fault(const std::string& what) { throw Fault(what); }
std::string where() {
  return thread == nullptr ? ""
                           : " (CTA " + std::to_string(cta->block) + ", thread " + std::to_string(thread->index) + ")";
}

void wait_for(const Wait& wait) {
  thread->wait = wait;
  if ((*wait.word & wait.mask) != wait.blocked) return;
  thread->fiber.leave();
}
void let_others_run() {
  thread->wait = kGoOn;
  thread->rests_in = cta->round;
  thread->fiber.leave();
}

std::uint8_t* bytes_of(Cta& c, std::uint32_t address, std::uint32_t bytes) {
  if (address >= kStaticAddress / 2) return c.anchor + static_cast<std::int32_t>(address - kStaticAddress);
  const auto size = static_cast<std::uint32_t>(c.cluster->launch->shared_bytes);
  if (address > size || bytes > size - address || c.dynamic == nullptr) {
    fault("shared memory has " + std::to_string(size) + " bytes: no " + std::to_string(bytes) + " at " +
          std::to_string(address) + where());
  }
  return c.dynamic + address;
}

Mbarrier& mbarrier(Cta& c, std::uint32_t address) {
  const auto found = c.mbarriers.find(address);
  if (found == c.mbarriers.end()) fault("no mbarrier at " + std::to_string(address) + where());
  return found->second;
}
void settle(Mbarrier& b, std::uint32_t address) {
  if (b.pending < 0) fault("the mbarrier at " + std::to_string(address) + " has too many arrivals" + where());
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.count;
  }
}
void arrive(Cta& c, std::uint32_t address, std::uint32_t expected_bytes) {
  Mbarrier& b = mbarrier(c, address);
  b.bytes += expected_bytes;
  --b.pending;
  settle(b, address);
}

// ---- asynchronous copies ----
void land(Cta& c, Thread& t) {
  const CpAsync copy = t.copies.front();
  t.copies.pop_front();
  if (copy.arrives) {
    --t.arrivals_due;
    arrive(c, copy.shared, 0);
    return;
  }
  std::uint8_t* to = bytes_of(c, copy.shared, copy.bytes);
  if (copy.global != nullptr) {
    std::memcpy(to, copy.global, copy.bytes);
  } else {
    std::memset(to, 0, copy.bytes);
  }
  c.unfenced.emplace_back(copy.shared, copy.bytes);
}
void land(Cta& c, const BulkCopy& copy) {
  for (std::size_t rank = 0; rank < c.cluster->ctas.size(); ++rank) {
    if ((copy.cta_mask >> rank & 1) == 0) continue;
    Cta& to = c.cluster->ctas[rank];
    for (const Piece& p : copy.pieces) {
      std::uint8_t* bytes = bytes_of(to, p.shared, p.bytes);
      if (p.global != nullptr) {
        std::memcpy(bytes, p.global, p.bytes);
      } else {
        std::memset(bytes, 0, p.bytes);
      }
      std::memcpy(to.engine_view.data() + p.shared, bytes, p.bytes);
    }
    Mbarrier& b = mbarrier(to, copy.barrier);
    b.bytes -= copy.bytes;
    settle(b, copy.barrier);
  }
}
void issue(BulkCopy copy) {
  if (cta->cluster->launch->schedule.late_copies) {
    cta->bulk_copies.push_back(std::move(copy));
  } else {
    land(*cta, copy);
  }
}
// Some of the copies that barriers wait for; false: there are none.
bool land_some(Cta& c) {
  bool any = false;
  for (;;) {
    bool due = false;
    for (std::size_t i = 0; i < c.bulk_copies.size();) {
      due = true;
      if (c.cluster->random() % 2 == 0) {
        const BulkCopy copy = std::move(c.bulk_copies[i]);
        c.bulk_copies.erase(c.bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
        land(c, copy);
        any = true;
      } else {
        ++i;
      }
    }
    for (Thread& t : c.threads) {
      if (t.arrivals_due == 0) continue;
      due = true;
      if (c.cluster->random() % 2 != 0) continue;
      while (!t.copies.front().arrives) land(c, t);
      land(c, t);
      any = true;
    }
    if (any || !due) return any;
  }
}

// ---- products ----
// Row `row` of a matrix in shared memory, 32 bytes of it.
void read_row(const Cta& c, std::uint64_t descriptor, int row, std::int8_t (&to)[32]) {
  const auto begin = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
  for (std::uint32_t half = 0; half < 2; ++half) {
    std::uint32_t at = begin + static_cast<std::uint32_t>(row) * 128 + half * 16;
    at ^= (at >> 7 & 7) << 4;
    if (at + 16 > c.engine_view.size()) fault("wgmma reads shared memory at " + std::to_string(at) + where());
    std::memcpy(to + 16 * half, c.engine_view.data() + at, 16);
  }
}
std::int32_t dot(const std::int8_t (&a)[32], const std::int8_t (&b)[32]) {
  std::int32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<std::int16_t>(a[i]) * static_cast<std::int16_t>(b[i]);
  return sum;
}
void multiply(const Cta& c, const Thread& t, const Product& p) {
  const int warp = static_cast<int>(t.index / 32 % 4), l = static_cast<int>(t.index % 32);
  std::int8_t a[2][32], b[32];
  for (int h = 0; h < 2; ++h) read_row(c, p.a, 16 * warp + 8 * h + l / 4, a[h]);
  for (int j = 0; j < p.tokens / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      read_row(c, p.b, 8 * j + 2 * (l % 4) + e, b);
      for (int h = 0; h < 2; ++h) {
        std::int32_t& sum = p.sums[4 * j + 2 * h + e];
        sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(p.accumulate ? sum : 0) +
                                        static_cast<std::uint32_t>(dot(a[h], b)));
      }
    }
  }
}

// ---- scheduling ----
void run_thread() {
  thread->fiber.entered();
  try {
    (*cta->cluster->kernel)();
    if (!thread->products.empty()) fault("a thread ends before its wgmma" + where());
  } catch (...) {
    if (cta->fault == nullptr) cta->fault = std::current_exception();
  }
  thread->done = true;
  --cta->left;
  thread->fiber.leave(true);
}

std::string waiting_threads(const Cluster& cluster) {
  std::map<std::string, std::pair<int, unsigned>> groups;
  for (const Cta& c : cluster.ctas) {
    for (const Thread& t : c.threads) {
      std::string what = "CTA " + std::to_string(c.block) + ": ";
      what += t.done ? std::string("ended") : std::string("at ") + t.wait.what + " " + std::to_string(t.wait.detail);
      auto& [count, first] = groups[what];
      if (count++ == 0) first = t.index;
    }
  }
  std::string text = "deadlock:";
  for (const auto& [what, group] : groups) {
    text += "\n  " + what + ": " + std::to_string(group.first) + " threads from " + std::to_string(group.second);
  }
  return text;
}

// False if the thread could not go on.
bool run_one(Cta& c, Thread& t) {
  if (t.done || t.rests_in == c.round || (*t.wait.word & t.wait.mask) == t.wait.blocked) return false;
  cta = &c;
  thread = &t;
  threadIdx = {t.index, 0, 0};
  blockIdx = {c.block, 0, 0};
  t.fiber.enter();
  thread = nullptr;
  if (c.fault != nullptr) std::rethrow_exception(c.fault);
  return true;
}

// Every thread that can go on does so: once, or, by an odd seed, warp after warp as far as it gets. False if none
// could.
bool run_threads(Cta& c) {
  const bool warps_apart = c.cluster->launch->schedule.seed % 2 != 0;
  const std::size_t group = warps_apart ? 32 : c.order.size();
  bool any = false;
  ++c.round;
  for (std::size_t begin = 0; begin < c.order.size(); begin += group) {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t i = begin; i < begin + group; ++i) {
        if (run_one(c, c.threads[c.order[i]])) moved = any = true;
      }
      if (!warps_apart) break;
    }
  }
  return any;
}

// Threads in any order; by an odd seed, a warp's lanes side by side.
void shuffle(Cta& c, std::mt19937& random) {
  std::vector<std::uint32_t> warp(c.order.size() / 32);
  for (std::uint32_t i = 0; i < warp.size(); ++i) warp[i] = i;
  std::ranges::shuffle(warp, random);
  for (std::size_t i = 0; i < c.order.size(); ++i) c.order[i] = warp[i / 32] * 32 + static_cast<std::uint32_t>(i % 32);
  if (c.cluster->launch->schedule.seed % 2 == 0) {
    std::ranges::shuffle(c.order, random);
  } else {
    for (auto at = c.order.begin(); at != c.order.end(); at += 32) std::shuffle(at, at + 32, random);
  }
}

std::vector<std::unique_ptr<Stack>>& stacks(std::uint32_t rank, std::size_t count) {
  static std::array<std::vector<std::unique_ptr<Stack>>, 2> all;
  while (all[rank].size() < count) all[rank].push_back(std::make_unique<Stack>());
  return all[rank];
}

void run_cta(Cluster& cluster, std::uint32_t rank) {
  const Launch& launch = *cluster.launch;
  Cta& c = cluster.ctas[rank];
  std::uint8_t* arrays[] = {sm80::shared, sm90::memory, reinterpret_cast<std::uint8_t*>(kernels::shared_floats)};
  std::unique_lock lock(cluster.mutex);
  for (std::uint8_t* a : arrays) {
    std::memset(a, kGarbage, static_cast<std::size_t>(launch.shared_bytes));
    std::memset(a + launch.shared_bytes, kCanary, kCanaryBytes);
  }
  c.anchor = &static_anchor;
  c.engine_view.assign(static_cast<std::size_t>(launch.shared_bytes), kGarbage);
  const auto& stack = stacks(rank, c.threads.size());
  for (std::size_t i = 0; i < c.threads.size(); ++i) c.threads[i].fiber.start(*stack[i], run_thread);
  try {
    while (!cluster.failed && c.left > 0) {
      cluster.turned.wait(lock, [&] { return cluster.turn == rank || cluster.failed; });
      if (cluster.failed) break;
      const std::size_t ctas = cluster.ctas.size();
      if (run_threads(c)) {
        cluster.idle = 0;
        // The CTAs of a cluster get apart as well.
        while (ctas > 1 && cluster.random() % 8 != 0 && run_threads(c)) {
        }
      } else if (++cluster.idle > ctas && land_some(c)) {
        cluster.idle = 0;
      }
      if (cluster.idle > 2 * ctas) fault(waiting_threads(cluster));
      if (ctas > 1) {
        do {
          cluster.turn = (cluster.turn + 1) % ctas;
        } while (cluster.turn != rank && cluster.ctas[cluster.turn].left == 0);
        cluster.turned.notify_all();
      }
    }
    for (const std::uint8_t* a : arrays) {
      for (int i = 0; !cluster.failed && i < kCanaryBytes; ++i) {
        if (a[launch.shared_bytes + i] != kCanary) fault("written behind shared memory, byte " + std::to_string(i));
      }
    }
  } catch (...) {
    cluster.failed = true;
    if (c.fault == nullptr) c.fault = std::current_exception();
    cluster.turned.notify_all();
  }
  // Shared memory goes away with the thread: the last one opens the door.
  ++cluster.ended;
  cluster.turned.notify_all();
  cluster.turned.wait(lock, [&] { return cluster.ended == cluster.ctas.size(); });
}

}  // namespace

void launch(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads % 32 != 0 || launch.shared_bytes > kMaxSharedBytes || launch.grid % launch.cluster != 0 ||
      launch.cluster > 2) {
    fault("no such launch");
  }
  gridDim = {static_cast<unsigned>(launch.grid), 1, 1};
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  for (int first = 0; first < launch.grid; first += launch.cluster) {
    Cluster cluster;
    cluster.launch = &launch;
    cluster.kernel = &kernel;
    cluster.random.seed(launch.schedule.seed * 7919 + static_cast<std::uint32_t>(first));
    cluster.ctas = std::vector<Cta>(static_cast<std::size_t>(launch.cluster));
    for (std::size_t r = 0; r < cluster.ctas.size(); ++r) {
      Cta& c = cluster.ctas[r];
      c.cluster = &cluster;
      c.rank = static_cast<std::uint32_t>(r);
      c.block = static_cast<unsigned>(first) + c.rank;
      c.threads = std::vector<Thread>(static_cast<std::size_t>(launch.threads));
      c.warps.resize(c.threads.size() / 32);
      c.left = c.threads.size();
      c.order.resize(c.threads.size());
      for (std::uint32_t i = 0; i < c.order.size(); ++i) c.threads[i].index = c.order[i] = i;
      if (launch.schedule.seed != 0) shuffle(c, cluster.random);
    }
    if (launch.predecessor) launch.predecessor(false);
    if (cluster.ctas.size() == 1) {
      run_cta(cluster, 0);
    } else {
      std::vector<std::thread> runners;
      for (std::uint32_t r = 0; r < cluster.ctas.size(); ++r) runners.emplace_back([&, r] { run_cta(cluster, r); });
      for (std::thread& t : runners) t.join();
    }
    thread = nullptr;
    for (const Cta& c : cluster.ctas) {
      if (c.fault != nullptr) std::rethrow_exception(c.fault);
    }
  }
}

// ---- warps and CTAs ----
int lane() { return static_cast<int>(thread->index % 32); }

const LaneValues* exchange(const char* instruction, std::uint32_t mask, const LaneValues& mine) {
  if (mask != ~0u) fault(std::string(instruction) + " of some lanes only" + where());
  Warp& w = cta->warps[thread->index / 32];
  if (w.arrived != 0 && std::strcmp(w.instruction, instruction) != 0) {
    fault(std::string("one warp is at ") + w.instruction + " and " + instruction + where());
  }
  w.instruction = instruction;
  const std::uint32_t generation = w.generation;
  LaneValues* values = w.values[generation % 2];
  values[lane()] = mine;
  w.arrived |= 1u << lane();
  if (w.arrived == ~0u) {
    w.arrived = 0;
    ++w.generation;
  } else {
    wait_for({&w.generation, ~0u, generation, instruction, thread->index / 32});
  }
  return values;
}

void grid_dependency_wait() {
  if (cta->waited) return;
  cta->waited = true;
  if (cta->cluster->launch->predecessor) cta->cluster->launch->predecessor(true);
}

void arrive_and_wait(NamedBarrier& b, int threads, const char* what, int id) {
  if (b.arrived > 0 && b.threads != threads) fault("a barrier of different numbers of threads" + where());
  b.threads = threads;
  const std::uint32_t generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
  } else {
    wait_for({&b.generation, ~0u, generation, what, static_cast<std::uint32_t>(id)});
  }
}
void cta_barrier(int id, int threads) {
  const int all = cta->cluster->launch->threads;
  arrive_and_wait(cta->barriers.at(static_cast<std::size_t>(id)), threads == 0 ? all : threads, "barrier", id);
}
void cluster_barrier() {
  arrive_and_wait(cta->cluster->barrier, cta->cluster->launch->threads * cta->cluster->launch->cluster,
                  "barrier of the cluster", 0);
}
std::uint32_t cluster_rank() { return cta->rank; }

// ---- shared memory ----
std::uint32_t shared_address(const void* p) {
  const auto* bytes = static_cast<const std::uint8_t*>(p);
  std::uint8_t* arrays[] = {sm80::shared, sm90::memory, reinterpret_cast<std::uint8_t*>(kernels::shared_floats)};
  for (std::uint8_t* a : arrays) {
    if (bytes < a || bytes >= a + kArrayBytes) continue;
    if (cta->dynamic != nullptr && cta->dynamic != a) fault("two kinds of dynamic shared memory" + where());
    cta->dynamic = a;
    return static_cast<std::uint32_t>(bytes - a);
  }
  const std::ptrdiff_t distance = bytes - cta->anchor;
  if (distance < -(1 << 26) || distance > 1 << 26) fault("not in shared memory" + where());
  return kStaticAddress + static_cast<std::uint32_t>(static_cast<std::int32_t>(distance));
}
std::uint8_t* shared_bytes(std::uint32_t address, std::uint32_t bytes) {
  if (address % bytes != 0) fault("shared address " + std::to_string(address) + " is not aligned" + where());
  return bytes_of(*cta, address, bytes);
}
std::int32_t load_remote(std::uint32_t shared, std::uint32_t rank) {
  std::int32_t word;
  std::memcpy(&word, bytes_of(cta->cluster->ctas.at(rank), shared, 4), 4);
  return word;
}
void send_word(std::uint32_t to, std::uint32_t barrier, std::uint32_t rank, std::int32_t word) {
  Cta& other = cta->cluster->ctas.at(rank);
  std::memcpy(bytes_of(other, to, 4), &word, 4);
  arrive(other, barrier, 0);
}
void fence_proxy_async() {
  for (const auto& [at, bytes] : cta->unfenced) {
    if (at < kStaticAddress / 2) std::memcpy(cta->engine_view.data() + at, bytes_of(*cta, at, bytes), bytes);
  }
  cta->unfenced.clear();
}

// ---- mbarriers ----
void barrier_init(std::uint32_t barrier, int count) {
  shared_bytes(barrier, 8);
  if (count < 1) fault("an mbarrier of no arrivals" + where());
  cta->mbarriers[barrier] = {0, count, count, 0};
}
void barrier_arrive(std::uint32_t barrier, std::uint32_t expected_bytes) { arrive(*cta, barrier, expected_bytes); }
void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) { mbarrier(*cta, barrier).bytes += bytes; }
void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank) { arrive(cta->cluster->ctas.at(rank), barrier, 0); }
void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  if (parity > 1) fault("a phase has parity 0 or 1" + where());
  wait_for({&mbarrier(*cta, barrier).phase, 1, parity, "mbarrier", barrier});
}

// ---- cp.async ----
void cp_async(std::uint32_t shared, const void* global, std::uint32_t bytes, bool valid) {
  shared_bytes(shared, bytes);
  if (valid && reinterpret_cast<std::uintptr_t>(global) % bytes != 0)
    fault("cp.async from a crooked address" + where());
  thread->copies.push_back({shared, bytes, valid ? global : nullptr, thread->copy_group, false});
  if (!cta->cluster->launch->schedule.late_copies) land(*cta, *thread);
}
void cp_async_commit() { ++thread->copy_group; }
void cp_async_wait(std::uint32_t pending) {
  let_others_run();
  while (!thread->copies.empty() && thread->copies.front().group + pending < thread->copy_group) {
    land(*cta, *thread);
  }
}
void cp_async_arrive(std::uint32_t barrier) {
  mbarrier(*cta, barrier);
  ++thread->arrivals_due;
  thread->copies.push_back({barrier, 0, nullptr, thread->copy_group, true});
  if (!cta->cluster->launch->schedule.late_copies) land(*cta, *thread);
}

// ---- bulk copies ----
void copy_bulk(std::uint32_t shared, const void* global, std::uint32_t bytes, std::uint32_t barrier) {
  if (shared % 16 != 0 || bytes % 16 != 0 || bytes == 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    fault("a bulk copy of " + std::to_string(bytes) + " bytes to " + std::to_string(shared) + ": not in 16s" + where());
  }
  issue({{{shared, bytes, static_cast<const std::uint8_t*>(global)}}, barrier, bytes, 1u << cta->rank});
}

struct Map {
  const std::uint8_t* base;
  std::uint64_t sizes[5], strides[4];
  std::uint32_t box[5], mark;
};
static_assert(sizeof(Map) <= sizeof(kernels::TensorMap));
constexpr std::uint32_t kMark = 0x5d5d5d5d;

kernels::TensorMap encode_tensor_map(const void* base, const std::uint64_t (&sizes)[5],
                                     const std::uint64_t (&strides)[4], const std::uint32_t (&box)[5]) {
  Map m{static_cast<const std::uint8_t*>(base), {}, {}, {}, kMark};
  std::ranges::copy(sizes, m.sizes);
  std::ranges::copy(strides, m.strides);
  std::ranges::copy(box, m.box);
  // What the driver refuses.
  bool good = reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && box[0] == 128;
  for (const std::uint64_t s : strides) good = good && s % 16 == 0 && s < std::uint64_t{1} << 40;
  for (const std::uint64_t s : sizes) good = good && s > 0 && s <= std::uint64_t{1} << 32;
  for (const std::uint32_t b : box) good = good && b > 0 && b <= 256;
  if (!good) fault("no such tensor map");
  kernels::TensorMap map{};
  std::memcpy(&map, &m, sizeof m);
  return map;
}

void copy_box(std::uint32_t shared, const kernels::TensorMap* map, const std::int32_t (&at)[5], std::uint32_t barrier,
              std::uint32_t cta_mask) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  if (m.mark != kMark) fault("not a tensor map" + where());
  if (shared % 1024 != 0) fault("a box goes to a multiple of 1024 bytes" + where());
  BulkCopy copy;
  copy.barrier = barrier;
  copy.cta_mask = cta_mask;
  std::uint32_t to = shared;
  std::int64_t i[5];
  for (i[4] = at[4]; i[4] < at[4] + std::int64_t{m.box[4]}; ++i[4]) {
    for (i[3] = at[3]; i[3] < at[3] + std::int64_t{m.box[3]}; ++i[3]) {
      for (i[2] = at[2]; i[2] < at[2] + std::int64_t{m.box[2]}; ++i[2]) {
        for (i[1] = at[1]; i[1] < at[1] + std::int64_t{m.box[1]}; ++i[1]) {
          // Columns in 16s: sizes are multiples of them.
          for (std::int64_t c = at[0]; c < at[0] + 128; c += 16, to += 16) {
            i[0] = c;
            bool inside = true;
            std::int64_t offset = c;
            for (int d = 0; d < 5; ++d) {
              inside = inside && i[d] >= 0 && i[d] < static_cast<std::int64_t>(m.sizes[d]);
              if (d > 0) offset += i[d] * static_cast<std::int64_t>(m.strides[d - 1]);
            }
            copy.pieces.push_back({to ^ (to >> 7 & 7) << 4, 16, inside ? m.base + offset : nullptr});
          }
        }
      }
    }
  }
  copy.bytes = to - shared;
  issue(std::move(copy));
}

// ---- wgmma ----
void wgmma(std::int32_t* sums, int tokens, std::uint64_t a, std::uint64_t b, bool accumulate) {
  for (const std::uint64_t d : {a, b}) {
    if (d >> 62 != 1 || (d >> 32 & 0x3fff) != 1024 / 16) fault("not the descriptor that is emulated" + where());
  }
  exchange("wgmma", ~0u, {});
  const Product p{sums, tokens, a, b, accumulate, thread->product_group};
  if (!cta->cluster->launch->schedule.late_products) {
    multiply(*cta, *thread, p);
    return;
  }
  if (!accumulate) std::fill_n(sums, tokens / 2, kNoSumYet);
  thread->products.push_back(p);
}
void wgmma_commit() { ++thread->product_group; }
void wgmma_wait(std::uint32_t pending) {
  let_others_run();
  while (!thread->products.empty() && thread->products.front().group + pending < thread->product_group) {
    multiply(*cta, *thread, thread->products.front());
    thread->products.pop_front();
  }
  // A warp's products are one instruction: no lane goes on before all are done.
  exchange("wgmma.wait_group", ~0u, {});
}

}  // namespace octomoe::emulator
