#include "octomoe/tensor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "support/errors.h"
#include "tensor/check.h"

namespace octomoe {
namespace {

TEST(Tensor, ShapesAndStrides) {
  Tensor t = Tensor::zeros(DType::float32, {2, 3, 4});
  EXPECT_EQ(t.bytes(), 96u);
  EXPECT_EQ(to_string(t.shape()), "[2, 3, 4]");
  EXPECT_TRUE(t.view().is_contiguous());
  t.as<float>()[1 * 12 + 2 * 4 + 3] = 5;
  const TensorView row = t.view().at(1).at(2);
  EXPECT_EQ(row.rank(), 1);
  EXPECT_EQ(row.as<float>()[3], 5);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.view().data()) % 64, 0u);
}

TEST(Tensor, CopyOfStridedView) {
  std::int32_t data[12];
  for (int i = 0; i < 12; ++i) data[i] = i;
  const TensorView transposed(data, DType::int32, Shape{4, 3}, Shape{1, 4});
  EXPECT_FALSE(transposed.is_contiguous());
  const Tensor copy = Tensor::copy_of(transposed);
  const std::int32_t expected[] = {0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11};
  EXPECT_EQ(std::memcmp(copy.as<std::int32_t>(), expected, sizeof(expected)), 0);
}

TEST(Tensor, EmptyAndSingletonDimensionsAreContiguous) {
  EXPECT_TRUE(TensorView(nullptr, DType::int8, Shape{0, 5}, Shape{99, 7}).is_contiguous());
  std::int8_t one = 0;
  EXPECT_TRUE(TensorView(&one, DType::int8, Shape{1, 1}, Shape{99, 7}).is_contiguous());
}

TEST(Tensor, AbsurdSizesAreOutOfMemory) {
  const std::int64_t big = std::numeric_limits<std::int64_t>::max() / 2;
  testing::expect_error(ErrorCode::out_of_memory, "cannot allocate float32 of shape", [&] {
    Tensor::empty(DType::float32, {big, big});
  });
  testing::expect_error(ErrorCode::out_of_memory, "cannot allocate", [&] { Tensor::empty(DType::int8, {big}); });
}

TEST(Tensor, ErrorsNameArgumentExpectedAndGot) {
  const Tensor t = Tensor::zeros(DType::int8, {2, 3});
  testing::expect_error("x: expected shape [*, 4], got [2, 3]", [&] { check_shape(t, "x", {-1, 4}); });
  testing::expect_error("x: expected dtype float32 or bfloat16, got int8", [&] {
    check_dtype(t, "x", {DType::float32, DType::bfloat16});
  });
  testing::expect_error("x: expected a tensor on cuda:1, got one on cpu",
                        [&] { check_device(t, "x", Device::cuda(1)); });
  testing::expect_error("x: expected a tensor, got none", [&] { check_defined(TensorView(), "x"); });
  testing::expect_error("slice: expected a range inside [2, 3], got [1, 3)", [&] { t.view().slice(1, 2); });
  testing::expect_error("shape: expected at most 5 dimensions, got 6", [&] { Shape({1, 1, 1, 1, 1, 1}); });
}

TEST(Tensor, NamesParseBack) {
  for (int i = 0; i < 9; ++i) EXPECT_EQ(parse_dtype(to_string(static_cast<DType>(i))), static_cast<DType>(i));
  EXPECT_EQ(parse_dtype("bf16"), DType::bfloat16);
  EXPECT_EQ(Device::parse("cuda:12"), Device::cuda(12));
  testing::expect_error("device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"cuda:x\"",
                        [&] { Device::parse("cuda:x"); });
  testing::expect_error("got \"float12\"", [&] { parse_dtype("float12"); });
}

}  // namespace
}  // namespace octomoe
