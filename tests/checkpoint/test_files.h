// Files for the checkpoint tests, written by hand: the byte layout here does not come from the code under test.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "octomoe/checkpoint.h"
#include "quant/numerics.h"

namespace octomoe::test {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Dims = std::vector<std::int64_t>;

class TempDir {
 public:
  TempDir() {
    std::string pattern = (fs::temp_directory_path() / "octomoe-XXXXXX").string();
    if (!::mkdtemp(pattern.data())) throw std::runtime_error("mkdtemp");
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
inline std::vector<std::string> list_folder(const std::string& path) {
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(path)) names.push_back(e.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// header length, header, data: exactly as given.
inline std::string raw_file(const std::string& header, const std::string& data, std::uint64_t length) {
  std::string out(reinterpret_cast<const char*>(&length), 8);
  return out + header + data;
}
inline std::string raw_file(const std::string& header, const std::string& data = "") {
  return raw_file(header, data, header.size());
}

struct RawTensor {
  std::string name, dtype;
  Dims shape;
  std::string bytes;
};

inline std::string safetensors_bytes(const std::vector<RawTensor>& tensors) {
  Json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const RawTensor& t : tensors) {
    header[t.name] = {
        {"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
    data += t.bytes;
  }
  return raw_file(header.dump(), data);
}

// ---- values ----

inline std::mt19937& rng() {
  static std::mt19937 engine(7);
  return engine;
}
inline std::int64_t product(const Dims& shape) {
  std::int64_t n = 1;
  for (const auto d : shape) n *= d;
  return n;
}
template <class T>
std::string bytes_of(const std::vector<T>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
}

// Gaussian weights, as F32, BF16 or F16.
inline RawTensor float_tensor(const std::string& name, const std::string& dtype, const Dims& shape,
                              float sigma = 0.05f) {
  std::normal_distribution<float> normal(0.0f, sigma);
  RawTensor t{name, dtype, shape, ""};
  std::vector<float> f;
  std::vector<std::uint16_t> h;
  for (std::int64_t i = 0; i < product(shape); ++i) {
    const float x = normal(rng());
    if (dtype == "F32") f.push_back(x);
    if (dtype == "BF16") h.push_back(num::float_to_bf16(x));
    if (dtype == "F16") h.push_back(num::float_to_fp16(x));
  }
  t.bytes = bytes_of(f) + bytes_of(h);
  return t;
}
inline RawTensor positive_tensor(const std::string& name, const std::string& dtype, const Dims& shape) {
  std::uniform_real_distribution<float> uniform(0.001f, 0.1f);
  RawTensor t{name, dtype, shape, ""};
  std::vector<float> f;
  std::vector<std::uint16_t> h;
  for (std::int64_t i = 0; i < product(shape); ++i) {
    const float x = uniform(rng());
    dtype == "F32" ? f.push_back(x) : h.push_back(dtype == "BF16" ? num::float_to_bf16(x) : num::float_to_fp16(x));
  }
  t.bytes = bytes_of(f) + bytes_of(h);
  return t;
}
inline RawTensor int_tensor(const std::string& name, const std::string& dtype, const Dims& shape, int low, int high) {
  std::uniform_int_distribution<int> uniform(low, high);
  RawTensor t{name, dtype, shape, std::string(static_cast<std::size_t>(product(shape)), '\0')};
  for (char& c : t.bytes) c = static_cast<char>(uniform(rng()));
  return t;
}

inline std::vector<float> floats_of(const RawTensor& t) {
  std::vector<float> out;
  for (std::size_t i = 0; i < t.bytes.size(); i += t.dtype == "F32" ? 4 : 2) {
    float f = 0;
    std::uint16_t h = 0;
    std::memcpy(&f, t.bytes.data() + i, t.dtype == "F32" ? 4 : 0);
    std::memcpy(&h, t.bytes.data() + i, t.dtype == "F32" ? 0 : 2);
    out.push_back(t.dtype == "F32" ? f : (t.dtype == "BF16" ? num::bf16_to_float(h) : num::fp16_to_float(h)));
  }
  return out;
}

// ---- comparison ----

inline std::string bytes_of(const Tensor& t) {
  return t.defined() ? std::string(t.as<char>(), t.bytes()) : std::string("undefined");
}
inline Dims dims_of(const Tensor& t) { return {t.shape().dims().begin(), t.shape().dims().end()}; }

inline void expect_equal(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  EXPECT_EQ(a.scheme, b.scheme);
  EXPECT_EQ(std::tie(a.experts, a.n, a.k, a.segments), std::tie(b.experts, b.n, b.k, b.segments));
  EXPECT_EQ(a.flush_blocks, b.flush_blocks);
  EXPECT_EQ(dims_of(a.values), dims_of(b.values));
  EXPECT_TRUE(bytes_of(a.values) == bytes_of(b.values)) << "values differ";
  EXPECT_EQ(dims_of(a.scale), dims_of(b.scale));
  EXPECT_TRUE(bytes_of(a.scale) == bytes_of(b.scale)) << "scales differ";
  EXPECT_TRUE(bytes_of(a.q) == bytes_of(b.q)) << "integer scales differ";
  EXPECT_TRUE(bytes_of(a.column_sum) == bytes_of(b.column_sum)) << "column sums differ";
  EXPECT_TRUE(bytes_of(a.activation_scale) == bytes_of(b.activation_scale)) << "activation scales differ";
}
inline void expect_equal(const MoeWeights& a, const MoeWeights& b) {
  EXPECT_EQ(a.scheme, b.scheme);
  EXPECT_EQ(a.activation, b.activation);
  EXPECT_EQ(a.gate_up_order, b.gate_up_order);
  expect_equal(a.w13, b.w13);
  expect_equal(a.w2, b.w2);
}

// Runs fn, expects an Error of `code` whose text holds every part.
template <class Fn>
void expect_error(ErrorCode code, const std::vector<std::string>& parts, const Fn& fn) {
  try {
    fn();
  } catch (const Error& e) {
    EXPECT_STREQ(to_string(e.code()), to_string(code)) << e.what();
    for (const std::string& part : parts) EXPECT_THAT(e.what(), testing::HasSubstr(part));
    return;
  }
  ADD_FAILURE() << "no error; expected one with: " << testing::PrintToString(parts);
}

}  // namespace octomoe::test
