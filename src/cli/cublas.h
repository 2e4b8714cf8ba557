// cuBLAS, opened at run time: the int8 product of one expert, as a peer of our kernels.
#pragma once

#include <cstdint>
#include <string>

#include "octomoe/layer.h"

namespace octomoe::cli {

class Cublas {
 public:
  explicit Cublas(Device device);  // in the current context; Error(unsupported) if the library is missing
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  const std::string& version() const { return version_; }
  // Work goes there from now on. Can be captured: the workspace is ours.
  void use(Stream stream);
  // out[rows, n] = a[rows, k] . w[n, k]^T, int8 -> int32, no scales. k is a multiple of 4.
  struct Product {
    const std::int8_t *a, *w;
    std::int32_t* out;
    std::int64_t rows, n, k;
  };
  void multiply(const Product& p) const;

 private:
  struct Functions;
  void check(int status, const char* call) const;
  std::string version_;
  Functions* call_;
  void* handle_ = nullptr;
  Tensor workspace_;
};

}  // namespace octomoe::cli
