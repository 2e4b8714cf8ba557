// Device memory for tensors, and copies between devices.
#pragma once

#include <cstddef>
#include <memory>

#include "octomoe/tensor.h"

namespace octomoe::cuda {

// 256-byte aligned; nullptr if the device has no room. Error(unsupported) without a driver.
std::shared_ptr<const void> allocate(int device, std::size_t bytes);
void fill_zero(void* data, std::size_t bytes, int device);
// Both of one shape and dtype; rows contiguous. Waits for the work of both devices before and for the copy after.
void copy(const TensorView& from, const TensorView& to);

}  // namespace octomoe::cuda
