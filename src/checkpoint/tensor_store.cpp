#include "checkpoint/tensor_store.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "checkpoint/file_io.h"
#include "checkpoint/json_read.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace fs = std::filesystem;

std::map<std::string, std::string> parse_weight_map(const std::string& text, const std::string& path) {
  const nlohmann::json json = parse_json(text, path);
  const JsonObject top(json, path);
  const auto map = top.object("weight_map");
  if (!map) top.missing("weight_map");
  std::map<std::string, std::string> out;
  for (const auto& [name, value] : map->value().items()) {
    const auto file = map->string(name);
    // A shard lies beside its index: a name with a slash could reach any file of the machine.
    if (!file || file->empty() || file->find('/') != std::string::npos || file->find('\0') != std::string::npos ||
        file->front() == '.') {
      map->wrong(name, "the name of a file in the same folder");
    }
    out.emplace(name, *file);
  }
  return out;
}

TensorStore TensorStore::open(const std::string& path) {
  TensorStore store;
  std::map<std::string, std::string> weight_map;
  std::vector<std::string> paths;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    store.folder_ = path;
    const std::string index = (fs::path(path) / "model.safetensors.index.json").string();
    const std::string single = (fs::path(path) / "model.safetensors").string();
    if (fs::exists(index, ignored)) {
      weight_map = parse_weight_map(read_text(index, kMaxIndexBytes), index);
      std::set<std::string> names;
      for (const auto& [tensor, file] : weight_map) names.insert(file);
      for (const std::string& name : names) paths.push_back((fs::path(path) / name).string());
    } else if (fs::exists(single, ignored)) {
      paths.push_back(single);
    } else {
      fail(ErrorCode::io, "{}: expected model.safetensors or model.safetensors.index.json in this folder, got neither",
           path);
    }
  } else {
    store.folder_ = (fs::path(path).has_parent_path() ? fs::path(path).parent_path() : fs::path(".")).string();
    paths.push_back(path);
  }

  for (const std::string& p : paths) {
    store.files_.push_back(SafetensorsFile::open(p));
    const std::size_t index = store.files_.size() - 1;
    const std::string file_name = fs::path(p).filename().string();
    for (const auto& info : store.files_.back().tensors()) {
      const auto wanted = weight_map.find(info.name);
      if (wanted != weight_map.end() && wanted->second != file_name) continue;  // a copy that the index does not use
      const auto [it, added] = store.where_.emplace(info.name, index);
      if (!added) {
        fail(ErrorCode::format, "{}: tensor {}: expected it in one file, got it in {} too", p, in_quotes(info.name),
             store.files_[it->second].path());
      }
    }
  }
  for (const auto& [name, file] : weight_map) {
    if (!store.has(name)) {
      fail(ErrorCode::format, "{}: expected a tensor {}, as the index says, got none of that name",
           (fs::path(store.folder_) / file).string(), in_quotes(name));
    }
  }
  return store;
}

const SafetensorsFile& TensorStore::file_of(const std::string& name) const {
  const auto it = where_.find(name);
  if (it == where_.end())
    fail(ErrorCode::format, "{}: expected a tensor {}, got none of that name", folder_, in_quotes(name));
  return files_[it->second];
}

const SafetensorsFile::Info* TensorStore::find(const std::string& name) const {
  const auto it = where_.find(name);
  return it == where_.end() ? nullptr : files_[it->second].find(name);
}

std::string TensorStore::describe(const std::string& name) const {
  return fmt::format("{}: tensor {}", file_of(name).path(), in_quotes(name));
}

std::vector<std::string> TensorStore::names() const {
  std::vector<std::string> out;
  out.reserve(where_.size());
  for (const auto& [name, index] : where_) out.push_back(name);
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace octomoe::checkpoint
