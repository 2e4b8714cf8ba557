// What the fuzzers call, one function each, so that the ordinary test suite can replay their corpora.
//
// Building and running them: docs/checkpoints.md, "Fuzzing".
//
// A target may throw octomoe::Error, nothing else. Each must check something beyond "it did not crash".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/expert_names.h"
#include "checkpoint/json_read.h"
#include "checkpoint/model_config.h"
#include "checkpoint/safetensors_format.h"
#include "checkpoint/tensor_store.h"

namespace octomoe::fuzz {

inline void require(bool ok) {
  if (!ok) std::abort();
}
inline std::string text_of(std::span<const std::uint8_t> input) {
  return {reinterpret_cast<const char*>(input.data()), input.size()};
}
// Messages go to terminals and to Python: UTF-8, and of a sane length.
inline void check_message(const Error& e) {
  const std::string text = e.what();
  require(text.size() < 4000);
  static_cast<void>(checkpoint::parse_json(
      "\"" +
          [&] {
            std::string escaped;
            for (const char c : text) {
              if (c == '"' || c == '\\') escaped += '\\';
              escaped += c;
            }
            return escaped;
          }() +
          "\"",
      "message"));
}

// The whole file: whatever the header promises must lie inside, without gap or overlap.
inline void safetensors(std::span<const std::uint8_t> input) {
  // A heap copy of the exact size lets AddressSanitizer see a read past the end.
  const std::vector<std::byte> file(reinterpret_cast<const std::byte*>(input.data()),
                                    reinterpret_cast<const std::byte*>(input.data()) + input.size());
  try {
    const checkpoint::ParsedHeader header = checkpoint::parse_safetensors(file, "fuzz");
    std::uint64_t at = header.tensors.empty() ? file.size() : header.tensors.front().begin;
    std::vector<std::string> names;
    for (const auto& t : header.tensors) {
      require(t.begin == at && t.end >= t.begin && t.end <= file.size());
      at = t.end;
      const auto bytes = checkpoint::tensor_bytes(*checkpoint::find_dtype(t.dtype_name), t.shape);
      require(bytes && *bytes == t.end - t.begin);
      names.push_back(t.name);
    }
    require(at == file.size());
    for (const auto& [index, layer] : checkpoint::find_expert_layers(names))
      require(index >= 0 && !layer.block.empty());
  } catch (const Error& e) {
    check_message(e);
  }
}

// config.json: sizes are within the limits that later arithmetic relies on, the scheme is a valid one.
inline void config(std::span<const std::uint8_t> input) {
  try {
    const ModelConfig c = checkpoint::parse_model_config(checkpoint::parse_json(text_of(input), "fuzz"), "fuzz");
    for (const std::int64_t size : {c.hidden, c.intermediate, c.experts, c.layers})
      require(size > 0 && size <= 1 << 24);
    require(c.top_k >= 1 && c.top_k <= c.experts && c.experts % c.route.groups == 0);
    require(c.shared_intermediate >= 0 && c.route.topk_groups <= c.route.groups);
    check(c.scheme);
    // Ours reads back as the same scheme.
    const auto json = checkpoint::make_quantization_config(c.scheme, {});
    if (!json.is_null()) {
      const auto copy = checkpoint::parse_json(json.dump(), "copy");
      require(checkpoint::parse_quantization_config(checkpoint::JsonObject(copy, "copy")).scheme == c.scheme);
    }
  } catch (const Error& e) {
    check_message(e);
  }
}

// model.safetensors.index.json: no file name leads out of the folder.
inline void index(std::span<const std::uint8_t> input) {
  try {
    for (const auto& [name, file] : checkpoint::parse_weight_map(text_of(input), "fuzz")) {
      require(!file.empty() && file.find('/') == std::string::npos && file != "..");
    }
  } catch (const Error& e) {
    check_message(e);
  }
}

using Target = void (*)(std::span<const std::uint8_t>);
inline const std::map<std::string, Target> kTargets = {
    {"safetensors", safetensors}, {"config", config}, {"index", index}};

}  // namespace octomoe::fuzz
