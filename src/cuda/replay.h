// A layer's recent kinds of calls, each with what it takes to make it once more (layer.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "octomoe/layer.h"

namespace octomoe::cuda {

// Calls of one kind launch the same kernels on the same grids. They differ in arguments at most.
struct CallKind {
  std::int64_t tokens;
  int top_k;
  Stream stream;      // a graph runs once at a time: a stream has its own
  bool adds = false;  // out may be added to, which takes other launches
  bool operator==(const CallKind&) const = default;
};

template <class State>
class Recent {
 public:
  explicit Recent(int most) : most_(static_cast<std::size_t>(most)) {}
  bool enabled() const { return most_ > 0; }
  // What is kept for calls of this kind. A new kind gets State() and takes the place of the one that was not used for
  // longest. Valid until the next find().
  State& find(const CallKind& kind) {
    Entry* oldest = nullptr;
    for (Entry& e : entries_) {
      if (e.kind == kind) {
        e.used = ++clock_;
        return e.state;
      }
      if (oldest == nullptr || e.used < oldest->used) oldest = &e;
    }
    if (entries_.size() < most_) oldest = &entries_.emplace_back();
    oldest->kind = kind;
    oldest->used = ++clock_;
    oldest->state = State();
    return oldest->state;
  }
  std::size_t size() const { return entries_.size(); }
  void clear() { entries_.clear(); }
  void disable() {
    clear();
    most_ = 0;
  }

 private:
  struct Entry {
    CallKind kind{};
    std::uint64_t used = 0;
    State state;
  };
  std::size_t most_;
  std::uint64_t clock_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace octomoe::cuda
