// Graphs of a layer's recent calls. A call that repeats an earlier one launches a graph instead of six kernels: the
// host pays a quarter of the time (docs/design.md, "Host cost of a call").
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/stream.h"
#include "octomoe/layer.h"

namespace octomoe::cuda {

// Whatever of a call's arguments its launches depend on, so that equal calls launch the same: addresses, not contents.
struct CallKey {
  const void *x, *ids, *weights, *out;
  const void* workspace;  // the caller's; null: the layer's own
  Stream stream;
  std::int64_t tokens, x_stride, ids_stride, weights_stride, out_stride;
  int top_k;
  DType x_type, ids_type, out_type;
  bool accumulate;
  bool operator==(const CallKey&) const = default;
};

class Replays {
 public:
  struct Call {
    CallKey key;
    std::size_t workspace_bytes = 0;  // 0: the call is new here
    void* workspace = nullptr;        // where the graph's lies
    int count = 0;                    // calls since there is no graph
    Graph graph;
    std::uint64_t used = 0;
  };

  explicit Replays(int most) : most_(static_cast<std::size_t>(most)) {}
  bool enabled() const { return most_ > 0; }
  // The call's entry; a new one takes the place of the one that was not used for longest, whose graph is released (the
  // driver keeps what is in flight until it has run). Valid until the next find().
  Call& find(const CallKey& key) {
    Call* oldest = nullptr;
    for (Call& c : calls_) {
      if (c.key == key) {
        c.used = ++clock_;
        return c;
      }
      if (oldest == nullptr || c.used < oldest->used) oldest = &c;
    }
    if (calls_.size() < most_) oldest = &calls_.emplace_back();
    *oldest = Call{};
    oldest->key = key;
    oldest->used = ++clock_;
    return *oldest;
  }
  std::size_t size() const { return calls_.size(); }
  void clear() { calls_.clear(); }
  void disable() {
    clear();
    most_ = 0;
  }

 private:
  std::size_t most_;
  std::uint64_t clock_ = 0;
  std::vector<Call> calls_;
};

}  // namespace octomoe::cuda
