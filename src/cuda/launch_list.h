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
    Launch how;                 // whatever its stream
    std::size_t offset, bytes;  // of the argument struct in args()
    bool same_launch(const Item& o) const;
  };

  void clear() {  // keeps its memory: the next call needs as much
    items_.clear();
    bytes_.clear();
  }
  void add(const LoadedKernel& kernel, const Launch& how, const void* args, std::size_t bytes);
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
  // Captures on a stream of its own. Error(out_of_memory) if the driver has no memory for it, Error(unsupported) if it
  // does not show the launches in the graph.
  explicit UpdatableGraph(const LaunchList& list);
  explicit operator bool() const { return static_cast<bool>(graph_); }
  // Makes the next launch one of this list. What is in flight keeps its arguments. False if the list has other kernels
  // or grids, or if the driver refuses: then the graph is gone.
  bool take(const LaunchList& list);
  void launch(Stream stream) const { graph_.launch(stream); }

 private:
  Graph graph_;
  LaunchList last_;                 // what the nodes hold
  std::vector<CuGraphNode> nodes_;  // by launch
};

}  // namespace octomoe::cuda
