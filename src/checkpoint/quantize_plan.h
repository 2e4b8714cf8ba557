// What quantize_checkpoint writes, decided before anything is written: a pure function of names, types and shapes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/expert_names.h"
#include "checkpoint/tensor_store.h"
#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

// One source tensor, or one expert's matrix of a fused one, and the tensors made of it.
struct QuantizeStep {
  enum class Kind { copy, matrix } kind = Kind::copy;
  std::string source;
  std::uint64_t source_bytes = 0;
  // matrix: `rows` rows from `row` of expert `expert` of the source seen as [experts, all rows, k].
  std::int64_t expert = 0, row = 0, rows = 0, k = 0;
  // per_tensor scheme: gate and up share a scale, so the other half is read as well.
  std::string partner;
  std::int64_t partner_row = 0;
  bool partner_first = false;
  // copy: [tensor]; matrix: [values], [scale], [integer scale or static scale of the input]
  std::vector<SafetensorsWriter::Entry> outputs;
  std::string module;  // matrix: the outputs' names without suffix
  std::uint64_t output_bytes() const;
};

struct QuantizePlan {
  std::vector<std::vector<QuantizeStep>> shards;
  std::vector<std::string> ignored;  // modules with a matrix that stays as it is
  std::uint64_t total_bytes = 0;     // of source tensors
};

QuantizePlan plan_quantize(const TensorStore& store, const ModelConfig& config, const std::map<int, LayerNames>& layers,
                           const Scheme& scheme, const QuantizeCheckpointOptions& options);

}  // namespace octomoe::checkpoint
