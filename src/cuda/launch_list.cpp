#include "cuda/launch_list.h"

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

bool same(const Dim3& a, const Dim3& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

CuKernelNodeParams node_params(const LaunchList::Item& item, void** parameters) {
  const LoadedKernel& k = *item.kernel;
  return {
      .function = k.function,
      .grid_x = item.how.grid.x,
      .grid_y = item.how.grid.y,
      .grid_z = item.how.grid.z,
      .block_x = static_cast<unsigned>(item.how.threads > 0 ? item.how.threads : k.threads),
      .block_y = 1,
      .block_z = 1,
      .shared_bytes = static_cast<unsigned>(item.how.shared_bytes >= 0 ? item.how.shared_bytes : k.shared_bytes),
      .parameters = parameters,
      .extra = nullptr,
      .kernel = nullptr,
      .context = nullptr,  // the current one
  };
}

}  // namespace

bool LaunchList::Item::same_launch(const Item& o) const {
  return kernel == o.kernel && same(how.grid, o.how.grid) && how.threads == o.how.threads &&
         how.shared_bytes == o.how.shared_bytes && how.pdl == o.how.pdl && how.cluster == o.how.cluster &&
         bytes == o.bytes;
}

void LaunchList::add(const LoadedKernel& kernel, const Launch& how, const void* args, std::size_t bytes) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;  // no launch, and no node
  constexpr std::size_t kAlignment = alignof(std::max_align_t);       // more is the driver's business: it copies
  const std::size_t offset = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
  bytes_.resize(offset + bytes);
  std::memcpy(bytes_.data() + offset, args, bytes);
  items_.push_back({&kernel, how, offset, bytes});
}

void LaunchList::launch(Stream stream) const {
  for (const Item& item : items_) {
    Launch how = item.how;
    how.stream = stream;
    launch_raw(*item.kernel, how, args(item), item.bytes);
  }
}

UpdatableGraph::UpdatableGraph(const LaunchList& list) : last_(list) {
  const OutsideCaptures outside;
  const OwnedStream stream;
  graph_ = Graph::capture(stream, [&] { list.launch(stream); });
  // The driver does not say in which order it lists the nodes: each is known by its kernel, grid and arguments.
  std::vector<CuGraphNode> nodes = graph_.node_list();
  for (const LaunchList::Item& item : list.items()) {
    const auto is_item = [&](CuGraphNode node) {
      if (node == nullptr) return false;
      CuKernelNodeParams p{};
      OCTOMOE_CUDA(cuGraphKernelNodeGetParams, node, &p);
      return p.function == item.kernel->function && p.grid_x == item.how.grid.x && p.parameters != nullptr &&
             std::memcmp(p.parameters[0], list.args(item), item.bytes) == 0;
    };
    const auto found = std::ranges::find_if(nodes, is_item);
    // Of two launches that are the same in everything, nobody could say which is which.
    if (found == nodes.end() || std::find_if(found + 1, nodes.end(), is_item) != nodes.end()) {
      fail(ErrorCode::unsupported, "kernel {}: expected its launch once in a captured graph, got it {}",
           item.kernel->entry.id, found == nodes.end() ? "not at all" : "more than once");
    }
    nodes_.push_back(std::exchange(*found, nullptr));
  }
}

bool UpdatableGraph::take(const LaunchList& list) {
  if (!std::ranges::equal(last_.items(), list.items(), &LaunchList::Item::same_launch)) return false;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const LaunchList::Item& item = list.items()[i];
    std::byte* last = last_.args(last_.items()[i]);
    if (std::memcmp(last, list.args(item), item.bytes) == 0) continue;
    void* parameters[] = {const_cast<std::byte*>(list.args(item))};
    const CuKernelNodeParams p = node_params(item, parameters);
    const CuResult rc = driver().cuGraphExecKernelNodeSetParams(graph_.exec(), nodes_[i], &p);
    if (rc != 0) [[unlikely]] {
      log(LogLevel::warning, fmt::format("kernel {}: cuGraphExecKernelNodeSetParams: {}; the graph is made anew",
                                         item.kernel->entry.id, error_text(rc)));
      *this = {};
      return false;
    }
    std::memcpy(last, list.args(item), item.bytes);
  }
  return static_cast<bool>(graph_);
}

}  // namespace octomoe::cuda
