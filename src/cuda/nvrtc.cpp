#include "cuda/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <type_traits>

#include "cuda/library_search.h"
#include "tensor/check.h"

namespace octomoe::cuda {
bool Nvrtc::open(Nvrtc& n, std::string& problem) {
  const LibraryStatus& library = find_library(Library::nvrtc);
  if (!library.usable) {
    problem = library.describe();
    return false;
  }
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library.handle, name));
    if (!function) missing += std::string(missing.empty() ? "" : ", ") + name;
  };
  Functions& f = n.call_;
  find(f.create, "nvrtcCreateProgram");
  find(f.destroy, "nvrtcDestroyProgram");
  find(f.compile, "nvrtcCompileProgram");
  find(f.cubin_size, "nvrtcGetCUBINSize");
  find(f.cubin, "nvrtcGetCUBIN");
  find(f.ptx_size, "nvrtcGetPTXSize");
  find(f.ptx, "nvrtcGetPTX");
  find(f.log_size, "nvrtcGetProgramLogSize");
  find(f.log, "nvrtcGetProgramLog");
  find(f.error, "nvrtcGetErrorString");
  find(f.version, "nvrtcVersion");
  find(f.arch_count, "nvrtcGetNumSupportedArchs");
  find(f.archs, "nvrtcGetSupportedArchs");
  if (!missing.empty()) {
    problem = fmt::format("NVRTC {} ({}) lacks {}", library.version, library.path, missing);
    return false;
  }
  int major = 0, minor = 0, count = 0;
  f.version(&major, &minor);
  f.arch_count(&count);
  n.version_ = major * 1000 + minor * 10;
  n.archs_.resize(static_cast<std::size_t>(count));
  f.archs(n.archs_.data());
  n.path_ = library.path;
  return true;
}

const Nvrtc* Nvrtc::find(std::string* problem) {
  static std::mutex mutex;
  static const Nvrtc* opened = nullptr;  // never closed
  const std::lock_guard lock(mutex);
  if (opened) return opened;
  std::string why;
  static Nvrtc* candidate = new Nvrtc;
  if (open(*candidate, why)) opened = candidate;  // a failure is tried again: see add_python_paths
  if (problem) *problem = why;
  return opened;
}

const Nvrtc& Nvrtc::get() {
  std::string problem;
  const Nvrtc* n = find(&problem);
  if (!n) fail(ErrorCode::unsupported, "cannot compile a kernel: {}", problem);
  return *n;
}

bool Nvrtc::supports(int arch) const { return std::find(archs_.begin(), archs_.end(), arch) != archs_.end(); }

NvrtcResult Nvrtc::compile(const NvrtcProgram& in) const {
  std::vector<const char*> names, texts, options;
  for (const auto& [name, text] : in.headers) {
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  for (const std::string& option : in.options) options.push_back(option.c_str());

  NvrtcResult out;
  Functions::Program program = nullptr;
  const auto ok = [&](int rc) {
    if (rc != 0 && out.failure.empty()) out.failure = call_.error(rc);
    return rc == 0;
  };
  if (!ok(call_.create(&program, in.source.c_str(), in.name.c_str(), static_cast<int>(names.size()), texts.data(),
                       names.data()))) {
    return out;
  }
  struct Destroy {
    const Functions& call;
    Functions::Program* program;
    ~Destroy() { call.destroy(program); }
  } destroy{call_, &program};

  const bool compiled = ok(call_.compile(program, static_cast<int>(options.size()), options.data()));
  std::size_t bytes = 0;
  if (call_.log_size(program, &bytes) == 0 && bytes > 1) {
    out.log.resize(bytes);
    call_.log(program, out.log.data());
    out.log.resize(out.log.find('\0') == std::string::npos ? bytes : out.log.find('\0'));
  }
  if (!compiled) return out;
  if (!ok((in.ptx ? call_.ptx_size : call_.cubin_size)(program, &bytes))) return out;
  out.image.resize(bytes);
  if (!ok((in.ptx ? call_.ptx : call_.cubin)(program, reinterpret_cast<char*>(out.image.data())))) return out;
  if (bytes == 0) out.failure = "an empty image";
  out.ok = bytes > 0;
  return out;
}

}  // namespace octomoe::cuda
