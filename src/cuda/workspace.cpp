#include "cuda/workspace.h"

#include <algorithm>
#include <numeric>

#include "cuda/stream.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {
constexpr std::size_t kAlignment = 256;
}

int WorkspacePlan::add(std::int64_t bytes, int first, int last) {
  const auto rounded = (static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)) + kAlignment - 1) / kAlignment;
  buffers_.push_back({rounded * kAlignment, first, last, 0});
  return static_cast<int>(buffers_.size()) - 1;
}

void WorkspacePlan::place() {
  std::vector<std::size_t> order(buffers_.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return buffers_[a].bytes > buffers_[b].bytes; });
  std::vector<const Buffer*> placed;  // by rising offset
  for (const std::size_t i : order) {
    Buffer& b = buffers_[i];
    std::size_t at = 0;
    for (const Buffer* other : placed) {
      if (other->last < b.first || b.last < other->first) continue;
      if (at + b.bytes <= other->offset) break;
      at = std::max(at, other->offset + other->bytes);
    }
    b.offset = at;
    bytes_ = std::max(bytes_, at + b.bytes);
    placed.insert(std::ranges::upper_bound(placed, b.offset, {}, &Buffer::offset), &b);
  }
}

std::size_t WorkspacePlan::live_bytes() const {
  std::size_t most = 0;
  for (const Buffer& step : buffers_) {  // the sum changes only where a buffer begins
    std::size_t sum = 0;
    for (const Buffer& b : buffers_) sum += b.first <= step.first && step.first <= b.last ? b.bytes : 0;
    most = std::max(most, sum);
  }
  return most;
}

void Workspaces::reserve(std::size_t bytes) {
  if (bytes <= reserved_) return;
  // Work that still uses the smaller ones is waited for by their release (cuMemFree).
  entries_.clear();
  entries_.push_back(
      {nullptr, false, Tensor::empty(DType::uint8, {static_cast<std::int64_t>(bytes)}, Device::cuda(device_))});
  reserved_ = bytes;
}

void* Workspaces::get(std::size_t bytes, Stream stream) {
  Entry* entry = nullptr;
  for (Entry& e : entries_) {
    if (e.used && e.stream == stream) entry = &e;
  }
  for (Entry& e : entries_) {
    if (entry == nullptr && !e.used) entry = &e;
  }
  if (entry != nullptr && entry->memory.bytes() >= bytes) {
    entry->used = true;
    entry->stream = stream;
    return entry->memory.view().data();
  }
  if (is_capturing(stream)) {
    bad_argument(
        "workspace: expected one of {} bytes to be there when a graph is captured (call reserve or run once on this "
        "stream before, or pass one), got {}",
        bytes, entry == nullptr ? std::size_t{0} : entry->memory.bytes());
  }
  Tensor memory =
      Tensor::empty(DType::uint8, {static_cast<std::int64_t>(std::max(bytes, reserved_))}, Device::cuda(device_));
  if (entry == nullptr) {
    entries_.push_back({stream, true, std::move(memory)});
    return entries_.back().memory.view().data();
  }
  OCTOMOE_CUDA(cuStreamSynchronize, cu_stream(entry->stream));
  *entry = {stream, true, std::move(memory)};
  return entry->memory.view().data();
}

void* Workspaces::choose(const TensorView& given, std::size_t bytes, Stream stream) {
  if (!given.defined()) return get(bytes, stream);
  check_device(given, "workspace", Device::cuda(device_));
  check_dtype(given, "workspace", {DType::uint8, DType::int8});
  check_contiguous(given, "workspace");
  if (given.bytes() < bytes) bad_argument("workspace: expected at least {} bytes, got {}", bytes, given.bytes());
  if (reinterpret_cast<std::uintptr_t>(given.data()) % kAlignment != 0) {
    bad_argument("workspace: expected memory aligned to {} bytes, got {}", kAlignment, given.data());
  }
  return given.data();
}

}  // namespace octomoe::cuda
