// MoeLayer, grouped_gemm, route: the three things a user calls.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "octomoe/export.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"
#include "octomoe/weights.h"

namespace octomoe OCTOMOE_API {

using Stream = void*;  // cudaStream_t of a CUDA device; ignored on the CPU

// Which of the GPU's GEMM kernels run. Results are the same to the bit.
enum class KernelFamily : std::uint8_t {
  automatic,  // the faster one for the call's size; OCTOMOE_KERNEL_FAMILY=sm80|sm90, read once, decides where it can
  sm80,       // mma.sync: every NVIDIA GPU from SM80 on, every integer scheme
  sm90,       // wgmma, on SM90: Error(unsupported) if it cannot run these weights
};

KernelFamily parse_kernel_family(const std::string& text);  // "automatic", "sm80", "sm90"; Error otherwise

// In which order a token's rows are added up.
enum class CombineOrder : std::uint8_t {
  slots,  // that of topk_ids, in float32, rounded once: the same bits on every engine and in every batch
  // As they come: GEMM2 adds its rows to out, and each sum is rounded to out's dtype. Last bits may differ from call to
  // call and with who else is in the batch; docs/schemes.md, section 4, has the bound. Done where GEMM2's kernel, the
  // shared expert's too, is one of SM90's, without biases of w2 and zero points, and out is bf16 or fp16 with rows that
  // begin at multiples of 16 bytes; everywhere else, also with a few tokens, for which other kernels are faster, as
  // slots.
  any,
};

CombineOrder parse_combine_order(const std::string& text);  // "slots", "any"; Error otherwise

struct LayerOptions {
  float swiglu_alpha = 1.702f;          // swigluoai
  std::optional<float> swiglu_limit;    // swigluoai (default 7 there) and swiglu (default: no clamp)
  bool router_weight_on_input = false;  // multiply x instead of the output row
  CombineOrder combine_order = CombineOrder::slots;
  std::optional<MoeWeights> shared_expert;  // E = 1 weights, same H and scheme kind; I may differ
  Tensor shared_gate;                       // [H] float32/bf16/fp16: the shared expert's weight is sigmoid(x . gate)
  // int32 [global experts] -> local expert, -1 = not on this rank. Its length tells the layer what share of the routes
  // to choose kernels for; where ids are local already, a map that leaves them as they are does.
  Tensor expert_map;
  int threads = 0;            // CPU: 0 = OCTOMOE_NUM_THREADS, else all cores (read once, here)
  bool keep_weights = false;  // CPU: keep the natural layout beside the packed one (weights() stays usable)
  // CUDA: normally GEMM1 gathers quantised tokens by itself, applies SwiGLU in its epilogue and, where the scheme's
  // scales are known there (int8_block with block_k = 128 on SM90), quantises the result. Off: as kernels of their own,
  // same results, to measure what the fusion is worth. Without fused_activation nothing is quantised there either.
  bool fused_gather = true, fused_activation = true, fused_requantize = true;
  KernelFamily family = KernelFamily::automatic;  // CUDA
  // CUDA: integer weights are copied into panels (WeightLayout) on the device, from which memory gives them faster than
  // from where they lie (docs/performance.md); K of both matrices a multiple of 128. What is not referenced elsewhere
  // is freed. Weights that come in panels are used as they are, with and without.
  bool prepack = false;
  // CUDA: from the third call on with the same T, k and stream, the host launches a graph that the layer has made,
  // instead of its kernels, and sets the arguments in which the call differs from the one before. Graphs of this many
  // kinds of calls are kept, the latest (about 0.11 MiB of GPU memory each, once made); 0: none, at most 64. Replayed
  // kernels have the stream's priority, but not what else a stream may have: an access policy window, a green context.
  int replays = 16;
};

struct ForwardOptions {
  bool accumulate = false;  // out += result instead of out = result
  // CUDA: ids outside -1..E-1 count as -1. With check_ids they are an Error, which needs a copy to the host: it
  // synchronises with the stream and cannot be captured. The CPU always checks.
  bool check_ids = false;
  // CUDA: uint8 [at least workspace_bytes(T, k)], 256-byte aligned, used by this call alone until it has run. Not
  // given: the layer's own, one for each stream (reserve() makes the first).
  TensorView workspace = {};
};

class MoeLayer {
 public:
  // Prepares the weights: the CPU packs them; CUDA uses those on its device where they lie and uploads others. Error if
  // they do not fit together or the device cannot run the scheme (CUDA: the integer schemes).
  MoeLayer(Device device, MoeWeights weights, LayerOptions options = {});
  ~MoeLayer();
  MoeLayer(MoeLayer&&) noexcept;
  MoeLayer& operator=(MoeLayer&&) noexcept;

  // Allocates the workspace for calls of up to max_tokens x top_k; later calls within it do not allocate. On CUDA, the
  // first call on a second stream allocates that stream's.
  void reserve(std::int64_t max_tokens, int top_k);
  std::size_t workspace_bytes(std::int64_t tokens, int top_k) const;  // a pure function of the shapes

  // x [T, H] bf16/fp16/float32, rows with any stride; topk_ids [T, k] int32 or int64, -1 = skipped (with an expert_map:
  // global ids); topk_weights [T, k] float32; out [T, H] bf16/fp16/float32. Nothing is written if an argument is wrong.
  // Calls on one layer from several threads are serialised; different layers run side by side. On CUDA every tensor is
  // on the layer's device, the work is put on `stream`, and the call returns at once.
  void forward(TensorView x, TensorView topk_ids, TensorView topk_weights, TensorView out,
               const ForwardOptions& options = {}, Stream stream = nullptr);

  std::int64_t experts() const;  // local
  std::int64_t hidden() const;
  std::int64_t intermediate() const;
  const Scheme& scheme() const;
  Device device() const;
  std::size_t weight_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// How rows belong to groups.
struct Groups {
  enum class Layout : std::uint8_t { offsets, masked };
  Layout layout = Layout::offsets;
  TensorView index;  // offsets: int32 or int64 [E+1] prefix sums; masked: int32 [E] rows used of each group
  static Groups offsets(TensorView expert_offsets) { return {Layout::offsets, expert_offsets}; }
  static Groups masked(TensorView rows_per_expert) { return {Layout::masked, rows_per_expert}; }
};

// A matrix stack made ready for a device (CPU: packed). Reuse it across calls. Values on a GPU are used where they lie,
// and must not change from then on: a GEMM may read them before kernels that were launched earlier have ended.
class PreparedMatrix {
 public:
  // prepack: as in LayerOptions.
  PreparedMatrix(Device device, QuantizedMatrix matrix, int threads = 0, KernelFamily family = KernelFamily::automatic,
                 bool prepack = false);
  ~PreparedMatrix();
  PreparedMatrix(PreparedMatrix&&) noexcept;
  PreparedMatrix& operator=(PreparedMatrix&&) noexcept;
  // Of a grouped_gemm over `rows` rows of a (masked: E * max_rows); 0 on the CPU.
  std::size_t workspace_bytes(std::int64_t rows) const;
  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// Activations of a grouped GEMM. Either floating point (quantised inside as the scheme says; scale, q, zero undefined),
// or already quantised with everything the scheme needs:
//   int8_channel  values int8 [R, K], scale float32 [R] (static: [1]), asymmetric: zero int32 [R]
//   int8_block    scale [R, KB]      int8_hybrid  scale F [R, SG], q uint8 [R, KB]
//   w4a8_fp8      values float8_e4m3, scale [R] (static: [E]; none: undefined)
// Masked layout: [E, max_rows, ...] in place of [R, ...].
struct Activations {
  TensorView values, scale, q, zero;
};

struct GemmOptions {
  TensorView bias = {};       // float32 [E, N]
  TensorView workspace = {};  // CUDA: as in ForwardOptions, PreparedMatrix::workspace_bytes(rows)
};

// d[r, :] = a[r, :] . b[expert of r]^T for every row; d [R, N] bf16, fp16 or float32 ([E, max_rows, N] when masked,
// rows past the count are not written). Offsets must start at 0, not decrease and end at R.
void grouped_gemm(const Activations& a, const PreparedMatrix& b, TensorView d, const Groups& groups,
                  const GemmOptions& options = {}, Stream stream = nullptr);

enum class Scoring : std::uint8_t { softmax, sigmoid };
enum class Renormalize : std::uint8_t {
  none,
  divide,   // w / max(sum, renormalize_min)
  add_eps,  // w / (sum + renormalize_min)
};

struct RouteOptions {
  Scoring scoring = Scoring::softmax;
  Renormalize renormalize = Renormalize::divide;
  float renormalize_min = 0.0f;
  float scaling_factor = 1.0f;
  int groups = 1;  // > 1: grouped top-k
  int topk_groups = 1;
  TensorView correction_bias;  // float32 [E], used for selection only

  static RouteOptions qwen3() { return {}; }
  static RouteOptions ernie45(TensorView bias);      // softmax, bias, sum clamped at 1e-12
  static RouteOptions deepseek_v3(TensorView bias);  // sigmoid, 8 groups of which 4, bias, sum + 1e-20, x 2.5
  static RouteOptions mixtral() { return {}; }       // top-k softmax = softmax, top-k, renormalise
};

// logits [T, E] float32/bf16/fp16 -> topk_weights [T, k] float32, topk_ids [T, k] int32. Ties go to the lower id. A
// token whose logits hold a NaN or +Inf gets NaN weights and the ids 0..k-1.
void route(TensorView logits, TensorView topk_weights, TensorView topk_ids, const RouteOptions& options = {},
           Stream stream = nullptr);

}  // namespace OCTOMOE_API
