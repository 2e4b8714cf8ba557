// octomoe/packs.h
#include "octomoe/packs.h"

#include "cuda/library_search.h"
#include "jit/kernel_store.h"

namespace octomoe {

void load_kernel_pack(const std::string& path) { jit::KernelStore::shared().add_pack(jit::Pack::open(path)); }

std::vector<std::string> kernel_packs() {
  std::vector<std::string> out;
  for (const auto& pack : jit::KernelStore::shared().packs()) out.push_back(pack->name());
  return out;
}

void add_cuda_library_paths(const std::vector<std::string>& paths) { cuda::add_python_paths(paths); }

}  // namespace octomoe
