// Reading and writing Mixture-of-Experts checkpoints: safetensors files, Hugging Face folders, quantised formats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "octomoe/export.h"
#include "octomoe/layer.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"
#include "octomoe/weights.h"

namespace octomoe OCTOMOE_API {

// A memory-mapped .safetensors file. Every length, offset, dtype, shape and overlap is checked when it is opened. The
// map is read-only: writing through a Tensor of it faults. A file that another process shortens while it is open raises
// SIGBUS.
class SafetensorsFile {
 public:
  struct Info {
    std::string name;
    std::string dtype_name;      // as in the file: "BF16", "I8", "F8_E4M3", ...
    std::optional<DType> dtype;  // unset if this library has no such type
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0, end = 0;  // bytes, from the start of the file
  };
  // Error(io) if the file cannot be read, Error(format) with path, tensor, expected and got if it is malformed.
  static SafetensorsFile open(const std::string& path);

  // In the order of their bytes. Of a temporary a copy: `for (auto& t : SafetensorsFile::open(p).tensors())` is sound.
  const std::vector<Info>& tensors() const&;
  std::vector<Info> tensors() &&;
  const Info* find(const std::string& name) const;  // null if absent
  // Keeps the map alive; no copy, unless the file does not align the tensor to its element. Error if absent, of a type
  // that this library does not have, or of more than kMaxRank dimensions.
  Tensor tensor(const std::string& name) const;
  // Of any type; valid while this object or a copy of it lives.
  std::span<const std::byte> bytes(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const&;
  std::map<std::string, std::string> metadata() &&;
  const std::string& path() const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

// Writes to a temporary name in the same folder and renames: the old file stays intact on any failure (full disk too).
// Tensors are declared first, then their bytes come in any order, so that a file larger than memory can be made. In the
// file wide types come first, which aligns every tensor to its element.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    std::string dtype_name;
    std::vector<std::int64_t> shape;
  };
  SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                    std::map<std::string, std::string> metadata = {});
  ~SafetensorsWriter();  // removes the temporary file if finish() was not reached
  void write(const std::string& name, const void* data, std::size_t bytes);  // appends to that tensor
  void finish();  // Error(invalid_argument) if a tensor is not complete; syncs and renames

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

enum class QuantFormat : std::uint8_t { none, compressed_tensors, block_int8, channel_int8, w4afp8, hybrid_int8 };
const char* to_string(QuantFormat format);

// What config.json says of the MoE layers.
struct ModelConfig {
  std::string model_type;  // qwen3_moe, qwen3_next, qwen3_5_moe, ernie4_5_moe, deepseek_v3, kimi_k2, mixtral
  std::int64_t hidden = 0, intermediate = 0, experts = 0, layers = 0;
  int top_k = 0;
  std::int64_t shared_intermediate = 0;  // 0 = no shared expert
  bool shared_gate = false;
  Activation activation = Activation::swiglu;
  RouteOptions route;  // without the bias tensor, which belongs to a layer
  bool has_correction_bias = false;
  QuantFormat format = QuantFormat::none;
  Scheme scheme;  // of the checkpoint: bf16/fp16 when it is not quantised
};

// A Hugging Face folder (or one .safetensors file beside a config.json).
class Checkpoint {
 public:
  // Error names the missing file or tensor, the unknown model_type or quant_method (with the known ones), or the field
  // of config.json whose value is not supported.
  static Checkpoint open(const std::string& path);

  const ModelConfig& config() const;
  std::vector<int> moe_layers() const;  // layers that have expert tensors, ascending

  struct Layer {
    MoeWeights experts;  // in the checkpoint's own scheme; bf16/fp16 if this layer is not quantised
    std::optional<MoeWeights> shared_expert;  // likewise; F8_E4M3 blocks (W4AFP8 checkpoints) become bf16
    Tensor shared_gate;                       // [H] as stored, or undefined
    Tensor router;                            // [E, H] as stored, all experts
    Tensor correction_bias;                   // float32 [E], all experts, or undefined
  };
  // Reads one layer; missing tensors are named. first_expert/count: a slice of the experts (expert parallelism), -1 =
  // all. Tensors that are one per expert are copied into [E, N, K]; fused bf16/fp16 ones are used where they lie in the
  // file.
  Layer layer(int index, std::int64_t first_expert = 0, std::int64_t expert_count = -1) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

struct QuantizeProgress {
  std::int64_t done = 0, total = 0;  // bytes of source tensors
  std::string current;
};

struct QuantizeCheckpointOptions {
  std::int64_t max_shard_bytes = std::int64_t{5} << 30;
  int threads = 0;
  bool overwrite = false;  // replace `out` if it holds a checkpoint (a folder without config.json is never replaced)
  bool shared_experts = true;  // quantise shared experts too, so that they run in the same layer
  // For a scheme with static activation scales: a safetensors file of captured layers.L.hidden_states [T, H] and
  // layers.L.topk_ids [T, k] or layers.L.router_logits [T, E] (without either the router's weight decides).
  std::string calibration = {};
  std::function<void(const QuantizeProgress&)> progress = {};  // after every tensor or expert's matrix
};

// Reads the folder `in` (bf16, fp16 or float32), writes the folder `out` with expert weights in `scheme` in the
// matching published format (int8_channel: compressed-tensors; int8_block: blockwise_int8; w4a8_fp8: w4afp8;
// int8_hybrid: ours, see docs/checkpoints.md; bf16/fp16: plain), one tensor per expert and projection, float32 scales,
// every other tensor unchanged, the config's quantization_config, and the other files of the folder. It holds the
// matrices of one expert at a time. What it writes reads back bit-equal to quantize() of the same tensors. `out`
// appears when everything is written; nothing is left behind on an error (or an exception thrown by `progress`). Static
// activation scales are those that calibrate() gives for `options.calibration`.
void quantize_checkpoint(const std::string& in, const std::string& out, const Scheme& scheme,
                         const QuantizeCheckpointOptions& options = {});

}  // namespace OCTOMOE_API
