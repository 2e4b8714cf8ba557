// Shapes of the parts of a QuantizedMatrix, shared by the quantiser, the reference and the engines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octomoe/weights.h"

namespace octomoe {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The sizes that follow from a scheme and [E, N, K].
struct MatrixLayout {
  std::int64_t blocks_n, blocks_k, super_groups, groups_k;
  DType value_dtype;
  Shape values, scale;  // scale has rank 0 if the scheme has none
};
MatrixLayout layout_of(const Scheme& scheme, std::int64_t experts, std::int64_t n, std::int64_t k, int segments);

// Error unless N and K suit the scheme: rows of a multiple of 16 bytes, K within the int32 bound.
void check_sizes(const Scheme& scheme, std::int64_t experts, std::int64_t n, std::int64_t k, int segments,
                 const std::string& name);

// float32, fp16 or bf16 of any of the accepted shapes -> contiguous float32 of `shape`; every value must be >= 0 and
// finite if `is_scale`.
Tensor to_float32(const TensorView& t, const std::string& name, const Shape& shape, bool is_scale);

// The shape that `values` has in the matrix's layout.
Shape values_shape(const QuantizedMatrix& m);
// Error unless the matrix can have its layout: panels are for integers and a K of whole panels.
void check_layout(const QuantizedMatrix& m, const std::string& name);

// int8 [E, N, K] <-> int8 [E, K/128, N, 128], both on the CPU: always a copy. threads 0 = all.
Tensor to_panels(const Tensor& values, int threads = 0);
Tensor from_panels(const Tensor& values, int threads = 0);

// Copies the K values of a row out of panels that lie on the CPU.
void gather_row(const QuantizedMatrix& m, std::int64_t expert, std::int64_t row, std::int8_t* out);

// The rows of an integer matrix whose values lie on the CPU, whatever its layout: where they lie, or gathered.
class IntegerRows {
 public:
  explicit IntegerRows(const QuantizedMatrix& m);
  const std::int8_t* read(std::int64_t expert, std::int64_t row);  // K values, valid until the next call

 private:
  const QuantizedMatrix& m_;
  std::vector<std::int8_t> buffer_;  // panels
};

// Columns per group of activations and weights along K: block_k, group_size, or all of K.
std::int64_t group_columns(const Scheme& scheme, std::int64_t k);

}  // namespace octomoe
