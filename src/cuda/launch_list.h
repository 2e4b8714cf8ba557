// The launches of a call, written down before they are made: kernel by kernel on a stream, or as a graph whose nodes
// get the arguments that have changed since it was last launched.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/module.h"
#include "cuda/stream.h"

namespace octomoe::cuda {

class LaunchList {
 public:
  struct Item {
    const LoadedKernel* kernel;
    unsigned blocks, cluster;
    std::size_t offset, bytes;  // of the argument struct in args()
    bool same_launch(const Item& o) const {
      return kernel == o.kernel && blocks == o.blocks && cluster == o.cluster && bytes == o.bytes;
    }
  };

  void clear() {  // keeps its memory: the next call needs as much
    items_.clear();
    bytes_.clear();
  }
  void add(const LoadedKernel& kernel, unsigned blocks, const void* args, std::size_t bytes, unsigned cluster = 1);
  // As dependent launches.
  void launch(Stream stream) const;

  const std::vector<Item>& items() const { return items_; }
  const std::byte* args(const Item& item) const { return bytes_.data() + item.offset; }
  std::byte* args(const Item& item) { return bytes_.data() + item.offset; }

 private:
  std::vector<Item> items_;
  std::vector<std::byte> bytes_;
};

// A graph of a list's launches that takes the arguments of later lists.
class UpdatableGraph {
 public:
  UpdatableGraph() = default;
  // Captures on a stream of its own. Error(out_of_memory) if the driver has no memory for it.
  explicit UpdatableGraph(const LaunchList& list);
  explicit operator bool() const { return static_cast<bool>(graph_); }
  // Whether `list` has the same kernels and grids.
  bool fits(const LaunchList& list) const;
  // Launches with the list's arguments. What is in flight keeps its own.
  void launch(const LaunchList& list, Stream stream);

 private:
  Graph graph_;
  LaunchList last_;
  std::vector<CuGraphNode> nodes_;  // by launch
};

}  // namespace octomoe::cuda
