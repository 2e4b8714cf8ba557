#include "checkpoint/expert_values.h"

#include <algorithm>
#include <cstring>

#include "base/thread_pool.h"
#include "cpu/ops.h"
#include "quant/matrix.h"
#include "quant/numerics.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

// Calls fn(source, destination, name) for every part; the parts stand one behind another in `out`.
template <class Fn>
void for_parts(const TensorStore& store, const Parts& p, const std::string& suffix, const Tensor& out, const Fn& fn) {
  const std::size_t bytes = out.bytes() / p.names.size();
  ThreadPool::shared().parallel_for(static_cast<std::int64_t>(p.names.size()), [&](std::int64_t i, int) {
    const std::string name = p.names[static_cast<std::size_t>(i)] + suffix;
    fn(store.tensor(name), out.as<std::byte>() + static_cast<std::size_t>(i) * bytes, name);
  });
}

}  // namespace

Tensor stack_bytes(const TensorStore& store, const Parts& p, const std::string& suffix, DType dtype, std::int64_t rows,
                   std::int64_t cols) {
  Tensor out = Tensor::empty(dtype, {p.experts(), p.segments * rows, cols});
  for_parts(store, p, suffix, out, [](const Tensor& src, std::byte* dst, const std::string&) {
    std::memcpy(dst, src.view().data(), src.bytes());
  });
  return out;
}

Tensor stack_float32(const TensorStore& store, const Parts& p, const std::string& suffix, Shape shape) {
  Tensor out = Tensor::empty(DType::float32, shape);
  for_parts(store, p, suffix, out, [](const Tensor& src, std::byte* dst, const std::string&) {
    cpu::to_float(src.view().data(), src.dtype(), src.elems(), reinterpret_cast<float*>(dst));
  });
  return out;
}

Tensor pack_int4(const TensorStore& store, const Parts& p) {
  Tensor out = Tensor::empty(DType::int4x2, {p.experts(), p.segments * p.n, p.k / 2});
  for_parts(store, p, ".weight", out, [&](const Tensor& src, std::byte* dst, const std::string& name) {
    const auto* v = src.as<std::int8_t>();
    for (std::int64_t i = 0; i < src.elems() / 2; ++i) {
      const int lo = v[2 * i], hi = v[2 * i + 1];
      if (std::min(lo, hi) < -8 || std::max(lo, hi) > 7) {
        fail(ErrorCode::format, "{}: expected 4-bit values in -8..7, got {}", store.describe(name),
             lo < -8 || lo > 7 ? lo : hi);
      }
      dst[i] = static_cast<std::byte>((lo & 0xf) | ((hi & 0xf) << 4));
    }
  });
  return out;
}

Tensor unpack_int4_words(const TensorStore& store, const Parts& p) {
  Tensor out = Tensor::empty(DType::int4x2, {p.experts(), p.segments * p.n, p.k / 2});
  const std::int64_t row_bytes = p.k / 2, source_row_bytes = ceil_div(p.k, 8) * 4;
  for_parts(store, p, ".weight_packed", out, [&](const Tensor& src, std::byte* dst, const std::string&) {
    for (std::int64_t r = 0; r < p.n; ++r) {
      const std::byte* s = static_cast<const std::byte*>(src.view().data()) + r * source_row_bytes;
      // Little-endian: the bytes are in our order already. value + 8 in 4 bits is the signed value with its top bit
      // flipped.
      for (std::int64_t c = 0; c < row_bytes; ++c) dst[r * row_bytes + c] = s[c] ^ std::byte{0x88};
    }
  });
  return out;
}

Tensor dequantize_fp8_blocks(const TensorStore& store, const Parts& p) {
  Tensor out = Tensor::empty(DType::bfloat16, {p.experts(), p.segments * p.n, p.k});
  const std::int64_t blocks_k = ceil_div(p.k, kFp8Block);
  for (std::size_t i = 0; i < p.names.size(); ++i) {
    const Tensor values = store.tensor(p.names[i] + ".weight"),
                 stored_scale = store.tensor(p.names[i] + ".weight_scale_inv");
    const Tensor scale = to_float32(stored_scale, p.names[i] + ".weight_scale_inv", stored_scale.shape(), true);
    auto* dst = out.as<std::uint16_t>() + static_cast<std::int64_t>(i) * p.n * p.k;
    for (std::int64_t r = 0; r < p.n; ++r) {
      for (std::int64_t c = 0; c < p.k; ++c) {
        const float s = scale.as<float>()[r / kFp8Block * blocks_k + c / kFp8Block];
        dst[r * p.k + c] = num::float_to_bf16(num::e4m3_to_float(values.as<std::uint8_t>()[r * p.k + c]) * s);
      }
    }
  }
  return out;
}

}  // namespace octomoe::checkpoint
