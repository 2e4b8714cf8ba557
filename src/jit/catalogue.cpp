#include "jit/catalogue.h"

#include <string_view>
#include <unordered_map>

namespace octomoe {

const KernelEntry* find_kernel(const std::string& id) {
  static const auto* by_id = [] {
    auto* map = new std::unordered_map<std::string_view, const KernelEntry*>;
    for (const KernelEntry& entry : catalogue()) map->emplace(entry.id, &entry);
    return map;
  }();
  const auto it = by_id->find(id);
  return it == by_id->end() ? nullptr : it->second;
}

}  // namespace octomoe
