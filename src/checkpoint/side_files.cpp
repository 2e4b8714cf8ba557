#include "checkpoint/side_files.h"

#include <array>
#include <filesystem>
#include <string_view>

#include "checkpoint/file_io.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

namespace fs = std::filesystem;

bool is_weights(const std::string& name) {
  static constexpr std::array<std::string_view, 12> kSuffixes = {".safetensors", ".safetensors.index.json",
                                                                 ".bin",         ".bin.index.json",
                                                                 ".pt",          ".pth",
                                                                 ".ckpt",        ".gguf",
                                                                 ".h5",          ".msgpack",
                                                                 ".onnx",        ".npz"};
  for (const std::string_view suffix : kSuffixes) {
    if (name.ends_with(suffix)) return true;
  }
  return false;
}

void copy_folder(const fs::path& in, const fs::path& out, bool top) {
  for (const fs::directory_entry& entry : fs::directory_iterator(in)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".") || is_weights(name) || (top && name == "config.json")) continue;
    // Links to files are followed (the Hugging Face cache is made of them), links to folders are not: they may loop.
    if (entry.is_directory() && !entry.is_symlink()) {
      fs::create_directory(out / name);
      copy_folder(entry.path(), out / name, false);
    } else if (entry.is_regular_file()) {
      copy_file(entry.path().string(), (out / name).string());
    }
  }
}

}  // namespace

void copy_side_files(const std::string& in, const std::string& out) {
  try {
    copy_folder(in, out, true);
  } catch (const fs::filesystem_error& e) {
    fail(ErrorCode::io, "cannot copy the files beside the weights: {}", e.what());
  }
}

}  // namespace octomoe::checkpoint
