// Grouped products on the CPU: rows sorted by expert times packed weights, cut into tasks that any thread can take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/finish.h"
#include "cpu/packed.h"
#include "octomoe/tensor.h"

namespace octomoe::cpu {

// Rows of activations as a scheme stores them: int8, E4M3, bf16 or fp16 values and their scales.
struct RowSet {
  std::uint8_t* values = nullptr;
  std::int64_t stride_bytes = 0;
  float* scale = nullptr;         // [rows][row_scales]; null: bf16, fp16
  std::int64_t scale_stride = 0;  // 0: all rows share one
  std::uint8_t* q = nullptr;      // hybrid [rows][blocks]
  std::int32_t* zero = nullptr;   // asymmetric [rows]
};

// What a RowSet of `rows` rows needs, and its parts laid out from `base` (null: only the size is of interest).
std::size_t row_set_bytes(const PackedMatrix& b, std::int64_t rows);
RowSet lay_out_rows(const PackedMatrix& b, std::int64_t rows, std::uint8_t* base);
// Row `row` of the set from k float32 values, as docs/schemes.md section 2 says.
void quantize_row(const PackedMatrix& b, const float* x, float static_scale, const RowSet& set, std::int64_t row);

// d[dest[r]] = activation(a[source[r]] . b[expert of r]) for sorted rows r.
struct Product {
  const PackedMatrix* b = nullptr;
  RowSet a;
  const std::int32_t* source = nullptr;  // row of `a` of each sorted row; null: itself
  const float* factor = nullptr;         // router weight on the input, per sorted row; null: none
  const float* bias = nullptr;           // [E][units][32]; null: none
  std::uint8_t* out = nullptr;
  std::int64_t out_stride_bytes = 0;
  const std::int64_t* dest = nullptr;  // row of `out`; null: itself
  DType out_dtype = DType::bfloat16;
  ActivationStep activation;
};

struct Task {
  std::int32_t product, expert;
  std::int64_t row;
  std::int32_t rows, unit, units;
  std::int32_t order;  // place before sorting: neighbours stay neighbours
  std::int64_t cost;
};

// Rows of one task at most: they stay in the second-level cache while the columns pass.
std::int64_t rows_per_task(const PackedMatrix& b);
// Bytes of scratch of one thread for tasks of up to `rows` rows.
std::size_t scratch_bytes(const PackedMatrix& b, std::int64_t rows);

// The rows of one expert of one product.
struct Group {
  std::int32_t product, expert;
  std::int64_t row, rows;
};
// An upper bound of what make_tasks returns for `rows` rows in `groups` groups.
std::size_t max_tasks(const PackedMatrix& b, std::int64_t rows, std::int64_t groups, int threads);
// Cuts groups into tasks, heaviest first. `tasks` has room for max_tasks.
std::int64_t make_tasks(const Product* products, const Group* groups, std::int64_t count, int threads, Task* tasks);
void run_task(const Product& p, const Task& task, std::uint8_t* scratch);

}  // namespace octomoe::cpu
