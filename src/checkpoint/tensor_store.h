// All tensors of a checkpoint, whatever file they lie in.
#pragma once

#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

// `model.safetensors.index.json`: tensor -> file. Error(format) for a file name that is not a plain name in the folder.
std::map<std::string, std::string> parse_weight_map(const std::string& text, const std::string& path);

class TensorStore {
 public:
  // A folder with model.safetensors or model.safetensors.index.json, or one .safetensors file.
  // Error names a missing file, and tensors that the index promises and no file holds.
  static TensorStore open(const std::string& path);

  const std::string& folder() const { return folder_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  bool has(const std::string& name) const { return where_.contains(name); }
  const SafetensorsFile::Info* find(const std::string& name) const;  // null if absent
  Tensor tensor(const std::string& name) const { return file_of(name).tensor(name); }
  std::span<const std::byte> bytes(const std::string& name) const { return file_of(name).bytes(name); }
  std::string describe(const std::string& name) const;  // "FILE: tensor `NAME`", for messages
  std::vector<std::string> names() const;               // sorted

 private:
  const SafetensorsFile& file_of(const std::string& name) const;
  std::string folder_;
  std::vector<SafetensorsFile> files_;
  std::unordered_map<std::string, std::size_t> where_;  // index of the file
};

}  // namespace octomoe::checkpoint
