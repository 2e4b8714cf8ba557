// Where the buffers of a call lie: a plan that lets buffers share memory when their lifetimes do not meet, and device
// memory that lives between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "octomoe/layer.h"
#include "octomoe/tensor.h"

namespace octomoe::cuda {

class WorkspacePlan {
 public:
  // A buffer that is written first in step `first` and read last in step `last`; returns its index.
  int add(std::int64_t bytes, int first, int last);
  // Gives every buffer its offset. The largest are placed first, each at the lowest place that is free all its life.
  void place();
  std::size_t bytes() const { return bytes_; }
  std::size_t live_bytes() const;  // the most that is alive in one step: no plan can need less
  std::size_t offset(int buffer) const { return buffers_[static_cast<std::size_t>(buffer)].offset; }

 private:
  struct Buffer {
    std::size_t bytes;
    int first, last;
    std::size_t offset;
  };
  std::vector<Buffer> buffers_;
  std::size_t bytes_ = 0;
};

// The workspaces that a layer or matrix owns: one for each stream that it has been called on, so that calls on two
// streams may overlap.
class Workspaces {
 public:
  explicit Workspaces(int device) : device_(device) {}
  void reserve(std::size_t bytes);
  // At least `bytes` for calls on `stream`. Allocates, and waits for the stream first, where what is there is too
  // small; Error(invalid_argument) if the stream is being captured then.
  void* get(std::size_t bytes, Stream stream);
  // The caller's (checked) if there is one, else get().
  void* choose(const TensorView& given, std::size_t bytes, Stream stream);

 private:
  struct Entry {
    Stream stream;
    bool used;
    Tensor memory;
  };
  int device_;
  std::size_t reserved_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace octomoe::cuda
