// The layout of WeightLayout::panels: nothing else on the host knows where a value lies in it.
#include <cstring>

#include "base/thread_pool.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe {
namespace {

// Of the 128 values of a row that panel `panel` of the expert holds.
std::int64_t panel_offset(std::int64_t panels, std::int64_t n, std::int64_t expert, std::int64_t panel,
                          std::int64_t row) {
  return ((expert * panels + panel) * n + row) * kPanelColumns;
}

// fn(natural offset, offset in the panels) of each run of 128 values.
template <class Fn>
void for_runs(std::int64_t experts, std::int64_t n, std::int64_t k, int threads, const Fn& fn) {
  const std::int64_t panels = k / kPanelColumns;
  ThreadPool::shared(threads).parallel_for(experts * panels, [&](std::int64_t i, int) {
    const std::int64_t e = i / panels, p = i % panels;
    for (std::int64_t row = 0; row < n; ++row)
      fn((e * n + row) * k + p * kPanelColumns, panel_offset(panels, n, e, p, row));
  });
}

}  // namespace

Shape values_shape(const QuantizedMatrix& m) {
  if (m.layout == WeightLayout::panels) return {m.experts, m.k / kPanelColumns, m.n, kPanelColumns};
  return layout_of(m.scheme, m.experts, m.n, m.k, m.segments).values;
}

void check_layout(const QuantizedMatrix& m, const std::string& name) {
  if (m.layout == WeightLayout::natural || (m.scheme.is_integer() && m.k % kPanelColumns == 0)) return;
  bad_argument(
      "{}.layout: expected natural (panels need an integer scheme and K a multiple of {}), got panels of K {} in {}",
      name, kPanelColumns, m.k, to_string(m.scheme));
}

Tensor to_panels(const Tensor& values, int threads) {
  check_defined(values, "values");
  check_device(values, "values", Device::cpu());
  check_dtype(values, "values", {DType::int8});
  check_shape(values, "values", {-1, -1, -1});
  check_contiguous(values, "values");
  const std::int64_t experts = values.dim(0), n = values.dim(1), k = values.dim(2);
  if (k % kPanelColumns != 0)
    bad_argument("values: expected K a multiple of {}, got {}", kPanelColumns, to_string(values.shape()));
  Tensor out = Tensor::empty(DType::int8, {experts, k / kPanelColumns, n, kPanelColumns});
  const auto* from = values.as<std::int8_t>();
  auto* to = out.as<std::int8_t>();
  for_runs(experts, n, k, threads,
           [&](std::int64_t natural, std::int64_t panel) { std::memcpy(to + panel, from + natural, kPanelColumns); });
  return out;
}

Tensor from_panels(const Tensor& values, int threads) {
  check_defined(values, "values");
  check_device(values, "values", Device::cpu());
  check_dtype(values, "values", {DType::int8});
  check_shape(values, "values", {-1, -1, -1, kPanelColumns});
  check_contiguous(values, "values");
  const std::int64_t experts = values.dim(0), n = values.dim(2), k = values.dim(1) * kPanelColumns;
  Tensor out = Tensor::empty(DType::int8, {experts, n, k});
  const auto* from = values.as<std::int8_t>();
  auto* to = out.as<std::int8_t>();
  for_runs(experts, n, k, threads,
           [&](std::int64_t natural, std::int64_t panel) { std::memcpy(to + natural, from + panel, kPanelColumns); });
  return out;
}

void gather_row(const QuantizedMatrix& m, std::int64_t expert, std::int64_t row, std::int8_t* out) {
  const std::int64_t panels = m.k / kPanelColumns;
  const auto* values = m.values.as<std::int8_t>();
  for (std::int64_t p = 0; p < panels; ++p)
    std::memcpy(out + p * kPanelColumns, values + panel_offset(panels, m.n, expert, p, row), kPanelColumns);
}

IntegerRows::IntegerRows(const QuantizedMatrix& m)
    : m_(m), buffer_(m.layout == WeightLayout::panels ? static_cast<std::size_t>(m.k) : 0) {}

const std::int8_t* IntegerRows::read(std::int64_t expert, std::int64_t row) {
  if (m_.layout == WeightLayout::natural) return m_.values.as<std::int8_t>() + (expert * m_.n + row) * m_.k;
  gather_row(m_, expert, row, buffer_.data());
  return buffer_.data();
}

}  // namespace octomoe
