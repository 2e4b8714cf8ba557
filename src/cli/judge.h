// One layer in several schemes: errors against the references, and times in interleaved rounds.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/harness.h"
#include "octomoe/checkpoint.h"

namespace octomoe::cli {

struct JudgeInput {
  const ModelConfig& config;
  Checkpoint::Layer layer;
  std::vector<Scheme> schemes;  // a quantised checkpoint: its own scheme only
  Tensor x = {};                // [T, H]
  Tensor logits = {};           // [T, E]; undefined: x . router
  Tensor calibration_x = {};    // for static schemes: other tokens
  Tensor calibration_logits = {};
  std::int64_t judged_tokens = 0;  // the first tokens, compared with the references
  int threads = 0;
  Device device = {};  // of the layers; the references are computed on the CPU
  HarnessOptions timing = {};
  std::function<void(double fraction, const std::string& what)> on_step = {};
};

struct LayerJudgement {
  double error_vs_float = 0;      // against float64 arithmetic on unquantised weights
  double error_vs_quantised = 0;  // against the scheme's definition (src/quant/reference.h)
  bool bit_equal = false;         // to that definition
  double weight_bytes = 0;
  double us = 0;  // median of a forward call of all tokens
};

struct Judgement {
  std::vector<LayerJudgement> schemes;
  std::optional<double> bf16_us = {};  // none on a GPU
};

Judgement judge(const JudgeInput& input);

}  // namespace octomoe::cli
