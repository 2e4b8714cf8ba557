// What config.json says: sizes, routing rule, quantisation.
#pragma once

#include <string>

#include "checkpoint/json_read.h"
#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

// How the quantised tensors are stored, beyond ModelConfig's format and scheme.
struct QuantConfig {
  QuantFormat format = QuantFormat::none;
  Scheme scheme = Scheme::bf16();
};

// Error(unsupported) names an unknown quant_method or any field with a value that this library does not compute.
QuantConfig parse_quantization_config(const JsonObject& quantization_config);
// The `quantization_config` for weights in `scheme`; `ignored`: modules that were left as they are.
nlohmann::ordered_json make_quantization_config(const Scheme& scheme, const std::vector<std::string>& ignored);
QuantFormat format_of(const Scheme& scheme);

// Everything but has_correction_bias of models where only the tensors tell, and the scheme of float checkpoints (bf16).
ModelConfig parse_model_config(const nlohmann::json& config, const std::string& path);

}  // namespace octomoe::checkpoint
