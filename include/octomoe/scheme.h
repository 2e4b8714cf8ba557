// Scheme: a (weight, activation, scale) format. docs/schemes.md defines each to the bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octomoe/error.h"
#include "octomoe/export.h"

namespace octomoe OCTOMOE_API {

enum class SchemeKind : std::uint8_t { int8_channel, int8_block, int8_hybrid, w4a8_fp8, bf16, fp16 };

enum class ActivationScale : std::uint8_t {
  dynamic,  // from each row (int8_block: from each group; int8_hybrid: Q per group and F per row)
  static_,  // given: one float per tensor (int8_channel) or per expert (w4a8_fp8)
  none,     // w4a8_fp8 only: x is converted as it is
};

struct Scheme {
  SchemeKind kind = SchemeKind::int8_channel;
  ActivationScale activation_scale = ActivationScale::dynamic;
  bool asymmetric = false;  // int8_channel, dynamic: activations with a zero point per row
  bool per_tensor = false;  // int8_channel: one weight scale per expert instead of one per channel
  int block_n = 128;        // int8_block, int8_hybrid: weight rows of a scale block
  int block_k = 128;      // int8_block, int8_hybrid: columns of a scale block, weights and activations; multiple of 32
  int super_group = 256;  // int8_hybrid: K-blocks that share one float
  int q_max = 16;         // int8_hybrid: largest integer scale, 1..64
  int group_size = 128;   // w4a8_fp8: columns per weight scale, multiple of 32; 0 = one scale per channel

  static Scheme int8_channel() { return {}; }
  static Scheme int8_block() { return of(SchemeKind::int8_block); }
  static Scheme int8_hybrid() { return of(SchemeKind::int8_hybrid); }
  static Scheme w4a8_fp8() { return of(SchemeKind::w4a8_fp8); }
  static Scheme bf16() { return of(SchemeKind::bf16); }
  static Scheme fp16() { return of(SchemeKind::fp16); }
  static Scheme of(SchemeKind kind) {
    Scheme s;
    s.kind = kind;
    return s;
  }

  // "int8_channel", "int8_channel:static", "int8_channel:asymmetric,per_tensor",
  // "int8_hybrid:block=128,super=256,q_max=16", "w4a8_fp8:group=0,static", "w4a8_fp8:none". Error names the bad part.
  static Scheme parse(const std::string& text);
  bool operator==(const Scheme&) const = default;

  bool is_integer() const { return kind <= SchemeKind::int8_hybrid; }
  bool has_blocks() const { return kind == SchemeKind::int8_block || kind == SchemeKind::int8_hybrid; }
};

const char* to_string(SchemeKind kind);
std::string to_string(const Scheme& scheme);  // canonical; parse(to_string(s)) == s
void check(const Scheme& scheme);   // Error(invalid_argument) if a parameter is out of range or does not apply
std::vector<Scheme> all_schemes();  // the default of each kind, the order of the documentation

enum class Activation : std::uint8_t {
  swiglu,
  geglu_tanh,
  geglu_erf,
  swigluoai,  // gated: w13 holds gate and up, [E, 2I, H]
  silu,
  gelu_tanh,
  gelu_erf,
  relu,
  relu2,
  none,  // not gated: w13 is [E, I, H]
};
inline bool is_gated(Activation a) { return a <= Activation::swigluoai; }
const char* to_string(Activation activation);
Activation parse_activation(const std::string& name);  // also "gelu" = gelu_erf, "geglu" = geglu_erf

// Which half of w13's 2I rows comes first. vLLM, SGLang, Hugging Face: gate_up; FlashInfer: up_gate.
enum class GateUpOrder : std::uint8_t { gate_up, up_gate };
const char* to_string(GateUpOrder order);
GateUpOrder parse_gate_up_order(const std::string& name);

}  // namespace OCTOMOE_API
