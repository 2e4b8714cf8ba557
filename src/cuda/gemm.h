// A quantised matrix on a device, and the launches that the layer and grouped_gemm share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/few_args.h"
#include "core/gemm_config.h"
#include "cuda/launch_list.h"
#include "cuda/module.h"
#include "cuda/observe.h"
#include "octomoe/weights.h"
#include "plan/cost.h"

namespace octomoe::cuda {

// Every launch of a call: same stream; kernels wait for their predecessor by themselves (kernels/ptx/grid.cuh). With a
// list, it only writes them down, and nobody watches.
class Launcher {
 public:
  Launcher(const DeviceInfo& device, Stream stream) : device_(device), stream_(stream), observer_(stage_observer) {}
  Launcher(const DeviceInfo& device, LaunchList& list) : device_(device), list_(&list) {}
  // At most `blocks`, and no more than are resident at once if `persistent`.
  template <class Args>
  void operator()(const LoadedKernel& kernel, std::int64_t blocks, const Args& args, bool persistent = true,
                  unsigned cluster = 1) const {
    const std::int64_t resident = std::int64_t{device_.multiprocessors} * kernel.blocks_per_multiprocessor;
    const std::int64_t grid = persistent ? std::min(blocks, resident / cluster * cluster) : blocks;
    exactly(kernel, {.grid = {static_cast<unsigned>(grid)}, .cluster = cluster}, args);
  }
  // With this grid, block and shared memory.
  template <class Args>
  void exactly(const LoadedKernel& kernel, Launch how, const Args& args) const {
    how.stream = stream_;
    how.pdl = true;
    if (list_ != nullptr) return list_->add(kernel, how, &args, sizeof(Args));
    launch(kernel, how, args);
  }
  // The launches that follow, for whoever watches (cuda/observe.h).
  void stage(const char* name) const {
    if (observer_ != nullptr) [[unlikely]]
      observer_->on_stage(name, stream_);
  }
  StageObserver* observer() const { return observer_; }

 private:
  const DeviceInfo& device_;
  Stream stream_ = nullptr;
  LaunchList* list_ = nullptr;
  StageObserver* observer_ = nullptr;
};

// How a launch lies among its neighbours on the stream (kernels::QuantizeArgs).
struct Overlap {
  bool beside_last = false, next_early = false;
};
inline constexpr int kLineBytes = 128;  // of L2

// Rows that a quantise kernel fills with zeros besides (kernels::QuantizeArgs::clear).
struct ClearedRows {
  void* first = nullptr;
  std::int64_t stride = 0, bytes = 0;  // of a row
};

// To which rows of out a GEMM adds its own, and times what (kernels::GemmArgs::add_to).
struct AddedRows {
  const std::int32_t* to = nullptr;
  const float* weight = nullptr;
};

// Quantised rows and their scales, in the order that GEMMs read (core/args.h).
struct QuantizedRows {
  std::int8_t* q = nullptr;
  float* scale = nullptr;           // [columns, rows]
  std::int32_t* block_q = nullptr;  // [KB, rows]
  std::int32_t* zero = nullptr;
  std::int64_t rows = 0;
};

// Elements that `scale` and `block_q` have for each row.
struct ScaleColumns {
  std::int64_t scale, block_q;
};

// Of a GEMM1 with SwiGLU: with swiglu_block it quantises what it makes, since a K-block of w2 is what a tile of w13 has
// (kernels/sm90/grouped_gemm.cuh). DeviceMatrix falls back to swiglu where no kernel can.
inline kernels::Epilogue swiglu_epilogue(const Scheme& w2) {
  return w2.kind == SchemeKind::int8_block && w2.block_k == 128 ? kernels::Epilogue::swiglu_block
                                                                : kernels::Epilogue::swiglu;
}

// What KernelFamily::automatic means in this process.
KernelFamily default_family();

class DeviceMatrix {
 public:
  // Values on `device` are used where they lie; everything else is uploaded. Error(unsupported) for what the kernels
  // cannot do; swiglu_block becomes swiglu where there is no kernel for it.
  // prepack: values are copied into panels.
  DeviceMatrix(QuantizedMatrix matrix, const Tensor& bias, kernels::Epilogue epilogue, KernelFamily family,
               bool prepack, const DeviceInfo& device, const char* name);

  std::int64_t experts() const { return m_.experts; }
  std::int64_t n() const { return m_.n; }
  std::int64_t k() const { return m_.k; }
  const Scheme& scheme() const { return m_.scheme; }
  ScaleColumns scale_columns() const;
  float static_scale() const { return static_scale_; }
  kernels::Epilogue epilogue() const { return epilogue_; }
  kernels::Promotion promotion() const { return key_.promotion; }
  // Whether quantize() can drop the lines of the bf16 rows that it has read: they are whole, and rows read but once.
  bool drops_lines() const;
  bool in_panels() const { return m_.layout == WeightLayout::panels; }
  const QuantizedMatrix& matrix() const { return m_; }
  // Whether there are narrow kernels for where wgmma's tiles are too few.
  bool has_stand_ins() const;
  // Loads the kernels that add (Problem::added), beside those that may be chosen; false: there is none. can_add: the
  // one for `rows` rows does.
  bool load_adding();
  bool can_add(std::int64_t rows) const;
  // Whether the kernel for `rows` rows can take a caller's scales as they lie (kernels::GemmArgs::scales_by_row).
  bool reads_scales_by_row(std::int64_t rows) const;
  // Whether the tiles of `rows` rows leave half of the multiprocessors without one.
  bool leaves_idle(std::int64_t rows) const;
  std::int64_t most_idle_rows() const;  // leaves_idle(more) is false
  // What the kernels for few tokens read, if they can run these weights.
  std::optional<kernels::FewMatrix> few() const;

  // x -> out for this matrix as the scheme says. row_count: on the device, null: `rows`.
  void quantize(const Launcher& launcher, const kernels::RowView& x, std::int64_t rows, const std::int32_t* row_count,
                const QuantizedRows& out, Overlap overlap = {}, bool read_once = false,
                const ClearedRows& cleared = {}) const;

  struct Problem {
    QuantizedRows a;
    const std::int32_t* index;      // offsets [E + 1] or counts [E]
    std::int32_t index_limit = 0;   // offsets that nobody has checked count as at most this; 0: they are right
    std::int32_t* taken = nullptr;  // a zero, which is zero again afterwards; null: tiles are shared out beforehand
    bool scales_by_row = false;     // a's scales and block_q are as a caller has them; if reads_scales_by_row(rows)
    // Launches that wrote them may still run (a caller's, index_limit, are looked at all the same, and again);
    // otherwise they were done two launches ago.
    bool index_late = false;
    kernels::Routes routes{};      // what index was made of, at most kCountedRoutes: then it need not be waited for
    bool read_next = false;        // the launch that follows reads out
    std::int64_t masked_rows = 0;  // rows of an expert; 0: offsets
    std::int64_t rows;             // most rows there can be in all
    std::int64_t likely_rows = 0;  // what the kernel is chosen for; 0: rows
    const std::int32_t* row_source = nullptr;
    const float* row_factor = nullptr;
    const float* bias = nullptr;  // null: the matrix's own
    void* out;
    std::int64_t out_stride;
    // L2 shall keep out's lines (bf16 or fp16) longest: the launch that follows reads and drops them, or rows are added
    // to them again and again.
    bool keep_out = false;
    // Rows are added to those of out, bf16 or fp16, aligned to 16 bytes; if can_add, for what the kernel is chosen for.
    std::optional<AddedRows> added;
    kernels::OutType out_type = kernels::OutType::bf16;
    float* out_scale = nullptr;  // swiglu_block: [columns / 128, rounded up, out_rows]
    std::int64_t out_rows = 0;
    bool up_first = false;
    float limit = 0;
  };
  void gemm(const Launcher& launcher, const Problem& problem) const;

  struct Kernel : plan::GemmKernel {
    bool by_model;                                // the cost model may choose it
    const LoadedKernel* loaded = nullptr;         // those that may be chosen are
    const LoadedKernel* loaded_adding = nullptr;  // load_adding()
  };
  const std::vector<Kernel>& candidates() const { return kernels_; }
  // From now on this candidate, whatever the rows; empty: as before.
  void force(const std::string& id);
  const plan::TuneKey& tune_key() const { return key_; }
  const Kernel& choose(std::int64_t rows) const;   // what gemm() launches for that many rows
  const Kernel& by_cost(std::int64_t rows) const;  // the same without tuned tables

 private:
  std::string why_not_wgmma(const DeviceInfo& device) const;  // empty: it can
  bool gated() const { return epilogue_ != kernels::Epilogue::store; }
  std::int32_t w_row() const { return static_cast<std::int32_t>(in_panels() ? kPanelColumns : m_.k); }
  std::int32_t w_panel() const { return static_cast<std::int32_t>(in_panels() ? m_.n * kPanelColumns : kPanelColumns); }

  QuantizedMatrix m_;  // every tensor on the device
  kernels::Epilogue epilogue_;
  Tensor bias_;
  float static_scale_ = 0;
  std::int64_t blocks_n_ = 0, blocks_k_ = 0, super_groups_ = 0;
  const LoadedKernel* quantizer_ = nullptr;
  std::vector<Kernel> kernels_;
  const Kernel* forced_ = nullptr;
  plan::TuneKey key_;
  bool tuned_ = false;                      // the tuned table is asked
  kernels::TensorMap weight_map_{};         // of the wgmma kernels
  mutable const Kernel* chosen_ = nullptr;  // of the last call; callers hold the layer's lock
  mutable std::int64_t chosen_rows_ = -1;
};

kernels::RowView row_view(const TensorView& rows);  // of a 2-D tensor
kernels::OutType out_type(DType dtype);
bool rows_are_aligned(const TensorView& t);  // every row begins at a multiple of 16 bytes

}  // namespace octomoe::cuda
