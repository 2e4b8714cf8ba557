#include "cli/cublas.h"

#include <dlfcn.h>

#include <type_traits>

#include "cuda/library_search.h"
#include "tensor/check.h"

namespace octomoe::cli {
namespace {

// cublas_api.h and library_types.h.
constexpr int kTranspose = 1, kKeep = 0, kInt8 = 3, kInt32 = 10, kComputeInt32 = 72, kDefaultAlgorithm = -1;
constexpr std::int64_t kWorkspaceBytes = std::int64_t{32} << 20;  // what cuBLAS asks for on Hopper

}  // namespace

struct Cublas::Functions {
  int (*create)(void**);
  int (*destroy)(void*);
  int (*set_stream)(void*, void*);
  int (*set_workspace)(void*, void*, std::size_t);
  int (*gemm)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
              void*, int, int, int, int);
  const char* (*text)(int);
};

Cublas::Cublas(Device device) : call_(new Functions{}) {
  const cuda::LibraryStatus& library = cuda::find_library(cuda::Library::cublas);
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library.handle, name));
    if (!function) missing += std::string(missing.empty() ? "" : ", ") + name;
  };
  if (library.usable) {
    find(call_->create, "cublasCreate_v2");
    find(call_->destroy, "cublasDestroy_v2");
    find(call_->set_stream, "cublasSetStream_v2");
    find(call_->set_workspace, "cublasSetWorkspace_v2");
    find(call_->gemm, "cublasGemmEx");
    find(call_->text, "cublasGetStatusString");
  }
  if (!library.usable || !missing.empty()) {
    delete call_;
    fail(ErrorCode::unsupported, "{}",
         library.usable ? fmt::format("{} lacks {}", library.describe(), missing) : library.describe());
  }
  version_ = library.version;
  workspace_ = Tensor::empty(DType::uint8, {kWorkspaceBytes}, device);
  check(call_->create(&handle_), "cublasCreate");
}

Cublas::~Cublas() {
  if (handle_ != nullptr) call_->destroy(handle_);
  delete call_;
}

void Cublas::check(int status, const char* call) const {
  if (status != 0) fail(ErrorCode::cuda, "{}: {}", call, call_->text(status));
}

void Cublas::use(Stream stream) {
  check(call_->set_stream(handle_, stream), "cublasSetStream");  // drops the workspace
  check(call_->set_workspace(handle_, workspace_.view().data(), workspace_.bytes()), "cublasSetWorkspace");
}

void Cublas::multiply(const Product& p) const {
  // Column-major, so out^T [n, rows] = w [n, k] . a^T [k, rows].
  const std::int32_t one = 1, zero = 0;
  const auto n = static_cast<int>(p.n), rows = static_cast<int>(p.rows), k = static_cast<int>(p.k);
  check(call_->gemm(handle_, kTranspose, kKeep, n, rows, k, &one, p.w, kInt8, k, p.a, kInt8, k, &zero, p.out, kInt32, n,
                    kComputeInt32, kDefaultAlgorithm),
        "cublasGemmEx");
}

}  // namespace octomoe::cli
