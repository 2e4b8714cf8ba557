#include "cuda/launch_list.h"

#include <algorithm>
#include <cstring>

#include "tensor/check.h"

namespace octomoe::cuda {
namespace {
constexpr std::size_t kArgsAlignment = 128;  // a tensor map's
}

void LaunchList::add(const LoadedKernel& kernel, unsigned blocks, const void* args, std::size_t bytes,
                     unsigned cluster) {
  if (blocks == 0) return;  // no launch, and no node
  const std::size_t offset = (bytes_.size() + kArgsAlignment - 1) / kArgsAlignment * kArgsAlignment;
  bytes_.resize(offset + bytes);
  std::memcpy(bytes_.data() + offset, args, bytes);
  items_.push_back({&kernel, blocks, cluster, offset, bytes});
}

void LaunchList::launch(Stream stream) const {
  for (const Item& item : items_) {
    launch_raw(*item.kernel, {.grid = {item.blocks}, .stream = stream, .pdl = true, .cluster = item.cluster},
               args(item), item.bytes);
  }
}

UpdatableGraph::UpdatableGraph(const LaunchList& list) : last_(list) {
  const OutsideCaptures outside;
  const OwnedStream stream;
  graph_ = Graph::capture(stream, [&] { list.launch(stream); });
  // The driver does not say in which order it lists the nodes: each is known by its kernel, grid and arguments.
  std::vector<CuGraphNode> nodes = graph_.node_list();
  for (const LaunchList::Item& item : list.items()) {
    const auto found = std::ranges::find_if(nodes, [&](CuGraphNode node) {
      if (node == nullptr) return false;
      CuKernelNodeParams p{};
      OCTOMOE_CUDA(cuGraphKernelNodeGetParams, node, &p);
      return p.function == item.kernel->function && p.grid_x == item.blocks &&
             std::memcmp(p.parameters[0], list.args(item), item.bytes) == 0;
    });
    if (found == nodes.end())
      fail(ErrorCode::internal, "kernel {}: its launch is not in the graph", item.kernel->entry.id);
    nodes_.push_back(*found);
    *found = nullptr;
  }
}

bool UpdatableGraph::fits(const LaunchList& list) const {
  return std::ranges::equal(last_.items(), list.items(), [](const auto& a, const auto& b) { return a.same_launch(b); });
}

void UpdatableGraph::launch(const LaunchList& list, Stream stream) {
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const LaunchList::Item& item = list.items()[i];
    std::byte* last = last_.args(last_.items()[i]);
    if (std::memcmp(last, list.args(item), item.bytes) == 0) continue;
    void* parameters[] = {const_cast<std::byte*>(list.args(item))};
    const CuKernelNodeParams p{
        .function = item.kernel->function,
        .grid_x = item.blocks,
        .grid_y = 1,
        .grid_z = 1,
        .block_x = static_cast<unsigned>(item.kernel->threads),
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = static_cast<unsigned>(item.kernel->shared_bytes),
        .parameters = parameters,
        .extra = nullptr,
        .kernel = nullptr,
        .context = nullptr,  // the current one
    };
    OCTOMOE_CUDA(cuGraphExecKernelNodeSetParams, graph_.exec(), nodes_[i], &p);
    std::memcpy(last, list.args(item), item.bytes);
  }
  graph_.launch(stream);
}

}  // namespace octomoe::cuda
