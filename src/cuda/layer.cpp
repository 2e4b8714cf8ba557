// A layer on a GPU: sort, quantise, GEMM1 with SwiGLU, quantise, GEMM2, combine, all on the caller's stream.
#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "base/log.h"
#include "core/args.h"
#include "cuda/engine.h"
#include "cuda/gemm.h"
#include "cuda/replay.h"
#include "cuda/stream.h"
#include "cuda/workspace.h"
#include "layer/check.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

// Calls of a kind before it gets a graph. To make one and to release it one day costs the host 28 us, what it saves in
// two or three calls, and 0.11 MiB on the GPU (H100, bench/results/host_cost_h100.json).
constexpr int kCallsBeforeGraph = 3;

// Of weights that the kernels for few tokens are likely to read at most, each route's counted: they save launches, and
// lose where routes or sums per K-block cost instructions. From there on the others are as fast (H100,
// docs/kernels.md). In panels they gain less, the others more. A single token's routes cost least, and those that the
// ids leave out, which the host does not know of, nothing.
std::int64_t few_most_bytes(const DeviceMatrix& m, std::int64_t tokens) {
  const bool panels = m.in_panels();
  return m.promotion() == kernels::Promotion::channel ? (panels        ? 152'000'000
                                                         : tokens == 1 ? 400'000'000
                                                                       : 270'000'000)
         : m.promotion() == kernels::Promotion::block ? (panels ? 130'000'000 : 190'000'000)
                                                      : (panels ? 80'000'000 : 152'000'000);
}

// The steps of a layer, for the lifetimes of its buffers.
enum Step : int { kFew, kSort, kQuantizeX, kGather, kGemm1, kActivate, kQuantizeH, kGemm2, kCombine };
// kFew: the kernels for few tokens, instead of all others. The shared expert runs between kQuantizeX and kGather: its
// own steps lie inside one of the layer's.

struct Expert {
  Expert(MoeWeights w, const LayerOptions& o, const DeviceInfo& device, const char* prefix)
      : activation(w.activation),
        up_first(w.gate_up_order == GateUpOrder::up_gate),
        fused(o.fused_activation && w.activation == Activation::swiglu),
        intermediate(w.intermediate()),
        w13(std::move(w.w13), w.b13, epilogue(o, w.w2.scheme), o.family, o.prepack, device,
            (std::string(prefix) + "w13").c_str()),
        w2(std::move(w.w2), w.b2, kernels::Epilogue::store, o.family, o.prepack, device,
           (std::string(prefix) + "w2").c_str()) {
    if (w13.epilogue() != kernels::Epilogue::swiglu_block) return;
    narrow_w13.emplace(w13.matrix(), w.b13, kernels::Epilogue::swiglu, o.family, o.prepack, device,
                       (std::string(prefix) + "w13").c_str());
    if (!narrow_w13->has_stand_ins()) narrow_w13.reset();
  }

  // GEMM1 of a call. Where tiles wide enough to quantise h leave multiprocessors idle, narrow ones with a quantise
  // kernel behind them are ahead (docs/kernels.md).
  const DeviceMatrix& first(std::int64_t likely_rows) const {
    return narrow_w13 && w13.leaves_idle(likely_rows) ? *narrow_w13 : w13;
  }
  kernels::Epilogue epilogue(const LayerOptions& o, const Scheme& w2) const {
    if (!fused) return kernels::Epilogue::store;
    return o.fused_requantize ? swiglu_epilogue(w2) : kernels::Epilogue::swiglu;
  }

  Activation activation;
  bool up_first, fused;
  std::int64_t intermediate;
  DeviceMatrix w13, w2;
  std::optional<DeviceMatrix> narrow_w13;  // the same weights
};

// GEMM1's kernels, and indices of an Expert's buffers in the plan.
struct ExpertBuffers {
  const DeviceMatrix* w13 = nullptr;
  int v = -1, h = -1, hq = -1, h_scale = -1, h_block_q = -1, h_zero = -1, y = -1;

  bool requantizes() const { return w13->epilogue() == kernels::Epilogue::swiglu_block; }
};
struct RowBuffers {
  int q = -1, scale = -1, block_q = -1, zero = -1;
  std::int64_t rows = 0;
};

// How the kernels for few tokens run; stages 0: the call is none for them.
struct FewPlan {
  kernels::FewGateUpLayout gate_up{};
  kernels::FewDownLayout down{};
  int columns = 0, stage_columns = 0, stages = 0;
};

struct Plan {
  std::int64_t tokens = -1;
  int top_k = 0;
  std::int64_t rows = 0;
  WorkspacePlan memory;
  int offsets = -1, chunk_counts = -1, row_token = -1, route_row = -1, row_factor = -1, token_offsets = -1,
      shared_weight = -1, few_h = -1;
  RowBuffers x, shared_x, gathered;
  ExpertBuffers routed, shared;
  FewPlan few;
};

class CudaLayer final : public LayerBackend {
 public:
  CudaLayer(int device, MoeWeights weights, const LayerOptions& o)
      : info_(device_info(device)),
        hidden_(weights.hidden()),
        experts_(weights.experts()),
        weight_on_input_(o.router_weight_on_input),
        any_order_(o.combine_order == CombineOrder::any),
        fused_gather_(o.fused_gather),
        alpha_(o.swiglu_alpha),
        limit_(o.swiglu_limit
                   ? *o.swiglu_limit
                   : (weights.activation == Activation::swigluoai ? 7.0f : std::numeric_limits<float>::infinity())),
        id_limit_(o.expert_map.defined() ? o.expert_map.elems() : weights.experts()),
        routed_(std::move(weights), o, info_, ""),
        workspaces_(device),
        recent_(o.replays) {
    const Device where = Device::cuda(device);
    const auto kernel = [&](const char* id) { return &load(plan::entry(id), device); };
    sort_ = kernel("sort");
    count_ = kernel("count");
    if (info_.compute_capability == 90) cluster_sort_ = kernel("sm90_sort");
    combine_ = kernel("combine");
    if (o.expert_map.defined()) expert_map_ = Tensor::copy_of(o.expert_map, where);
    if (o.shared_expert) shared_.emplace(*o.shared_expert, o, info_, "shared_expert.");
    // Kernels that add, if both have some: otherwise rows are added up in the order of the slots.
    any_order_ = any_order_ && routed_.w2.load_adding() && (!shared_ || shared_->w2.load_adding());
    if (o.shared_gate.defined()) {
      const Tensor gate = to_float32(o.shared_gate, "shared_gate", {hidden_}, false);
      shared_gate_ = Tensor::copy_of(gate, where);
      gate_kernel_ = kernel("shared_gate");
    }
    if (!routed_.fused || (shared_ && !shared_->fused)) activate_ = kernel("activate");
    if (!fused_gather_) gather_ = kernel("gather_rows");
    const KernelFamily family = o.family == KernelFamily::automatic ? default_family() : o.family;
    if (info_.compute_capability == 90 && family != KernelFamily::sm80 && routed_.fused && fused_gather_ && !shared_ &&
        routed_.w13.few() && routed_.w2.few() && hidden_ <= kernels::kFewMaxHidden) {
      const kernels::Promotion second = routed_.w2.promotion();
      const int lanes = kernels::few_column_lanes(second, static_cast<int>(routed_.intermediate));
      few_gate_up_ = kernel(plan::few_gate_up_id(routed_.w13.promotion()).c_str());
      few_down_ = kernel(plan::few_down_id(second, lanes).c_str());
      // A multiprocessor runs kernels beside each other only if they divide its L1 alike.
      const ContextGuard context(info_);
      for (const LoadedKernel* k : {few_gate_up_, few_down_}) {
        OCTOMOE_CUDA(cuFuncSetAttribute, k->function, kFunctionSharedCarveout, 100);
      }
    }
  }

  ~CudaLayer() override {
    // At the end of the process the driver may be gone already: no check, no throw.
    if (driver().cuCtxPushCurrent(info_.primary) != 0) return;
    recent_.clear();
    CuContext popped = nullptr;
    driver().cuCtxPopCurrent(&popped);
  }
  CudaLayer(const CudaLayer&) = delete;
  CudaLayer& operator=(const CudaLayer&) = delete;

  void reserve(std::int64_t max_tokens, int top_k) override {
    const ContextGuard context(info_);
    workspaces_.reserve(plan(max_tokens, top_k).memory.bytes());
  }
  std::size_t workspace_bytes(std::int64_t tokens, int top_k) const override {
    // PyTorch's operator asks before each call: the last answer is remembered.
    if (size_.tokens != tokens || size_.top_k != top_k) {
      size_ = {tokens, top_k, plan(tokens, top_k).memory.bytes()};
    }
    return size_.bytes;
  }

  void forward(const ForwardArgs& a) override {
    const std::int64_t tokens = a.x.dim(0);
    if (tokens == 0) return;
    const ContextGuard context(info_);
    const int top_k = static_cast<int>(a.topk_ids.dim(1));
    if (!recent_.enabled() || is_capturing(a.stream) || stage_observer != nullptr) {
      if (plan_.tokens != tokens || plan_.top_k != top_k) plan_ = plan(tokens, top_k);
      return launch_all(a, plan_, Launcher(info_, a.stream));
    }
    Kind& kind = recent_.find({tokens, top_k, a.stream, may_add(a)});
    if (kind.plan.tokens < 0) kind.plan = plan(tokens, top_k);
    list_.clear();
    launch_all(a, kind.plan, Launcher(info_, list_));
    if (!kind.graph.take(list_) && (++kind.calls < kCallsBeforeGraph || !make_graph(kind))) {
      return list_.launch(a.stream);
    }
    kind.graph.launch(a.stream);
  }

 private:
  struct Kind {
    Plan plan;
    int calls = 0;  // without a graph
    UpdatableGraph graph;
  };

  // False, once and for all, if the driver cannot make a graph of list_: it has no memory, or is an unknown one.
  bool make_graph(Kind& kind) {
    try {
      kind.graph = UpdatableGraph(list_);
      return true;
    } catch (const Error& e) {
      if (e.code() != ErrorCode::out_of_memory && e.code() != ErrorCode::unsupported) throw;
      log(LogLevel::warning, fmt::format("a layer on {} launches its kernels one by one from now on: no graph: {}",
                                         to_string(Device::cuda(info_.index)), e.what()));
      recent_.disable();
      return false;
    }
  }

  // Of a rank: its share of the routes, as `octomoe tune` counts them.
  std::int64_t likely_rows(std::int64_t routes) const {
    return std::max<std::int64_t>(1, routes * experts_ / id_limit_);
  }

  // Whether a good part of so many bf16 values is still in L2, and nowhere else, when the launch that follows has read
  // them. Of more, telling L2 that they are worth nothing then costs as much as it saves (docs/kernels.md).
  bool stays_in_l2(std::int64_t values) const { return values * 2 <= 3 * std::int64_t{info_.l2_bytes}; }
  // Whether out's elements can be added to by pairs, eight columns at once.
  bool may_add(const ForwardArgs& a) const {
    return any_order_ && a.out.dtype() != DType::float32 && rows_are_aligned(a.out);
  }
  // Whether combine drops y's lines (kernels::CombineArgs::read_once), which L2 keeps for it until then.
  bool drops_y(std::int64_t routes) const { return hidden_ % 256 == 0 && stays_in_l2(likely_rows(routes) * hidden_); }

  FewPlan plan_few(std::int64_t tokens, int top_k) const {
    const std::int64_t routes = tokens * top_k, row = routed_.intermediate,
                       bytes = likely_rows(routes) * 3 * hidden_ * row;
    const std::int64_t most_bytes = std::min(few_most_bytes(routed_.w13, tokens), few_most_bytes(routed_.w2, tokens));
    if (few_gate_up_ == nullptr || tokens > kernels::kFewTokens || routes > kernels::kFewRoutes || bytes > most_bytes) {
      return {};
    }
    const kernels::FewMatrix w13 = *routed_.w13.few();
    const auto with = [&](int gate_up_bytes) {
      return plan_few_down(kernels::few_gate_up_layout(routed_.w13.promotion(), w13, static_cast<int>(tokens), top_k,
                                                       info_.multiprocessors, gate_up_bytes),
                           static_cast<int>(routes));
    };
    const FewPlan p = with(kernels::kFewGateUpSharedBytes);
    if (p.stages == 0) return {};
    // Rows so long that a stage has one pair, or in panels a copy few bytes: slower, and from fewer bytes on.
    if (p.gate_up.stage_pairs == 1 && routed_.w13.promotion() != kernels::Promotion::channel &&
        2 * bytes > most_bytes) {
      return {};
    }
    if (routed_.w13.in_panels() && p.gate_up.stage_pairs < kernels::kFewMinPanelPairs) return {};
    // Where sums per K-block take time, a slot of down's ring is worth more than the last of many stages of gate_up's.
    if (routed_.w2.promotion() == kernels::Promotion::channel || p.gate_up.stages < kernels::kFewManyStages) return p;
    const FewPlan fewer = with(p.gate_up.bytes - kernels::kFewSharedUnit);
    return fewer.stages > p.stages ? fewer : p;
  }

  // `down` beside gate_up; no stages: there is no room.
  FewPlan plan_few_down(const kernels::FewGateUpLayout& gate_up, int routes) const {
    if (gate_up.stages < 2) return {};
    const kernels::FewMatrix w2 = *routed_.w2.few();
    const std::int64_t row = routed_.intermediate;
    FewPlan p{.gate_up = gate_up};
    p.columns = static_cast<int>(ceil_div(hidden_, info_.multiprocessors));
    const std::int64_t most = std::min<std::int64_t>(kernels::kFewMaxStageColumns, kernels::kFewMaxStageBytes / row);
    if (most == 0) return {};
    const auto down = [&](int stages) {
      return kernels::few_down_layout(routed_.w2.promotion(), w2, routes, p.columns, p.stage_columns, stages);
    };
    // Both kernels at once: besides what they ask for, a block has 1 KB of its own.
    const std::int64_t both = info_.shared_per_multiprocessor - 2 * 1024 - p.gate_up.bytes;
    // As many columns in a stage as two have room for.
    const std::int64_t fewest_sets = ceil_div(p.columns, most);
    std::int64_t fit = 0;
    for (std::int64_t sets = fewest_sets; fit < 2; ++sets) {
      p.stage_columns = static_cast<int>(ceil_div(p.columns, sets));
      if (sets > fewest_sets && p.stage_columns < kernels::kFewMinStageColumns) return {};
      const std::int64_t stage = p.stage_columns * row;
      const std::int64_t room = std::min<std::int64_t>(both, few_down_->shared_bytes) - down(0).bytes;
      fit = std::min(room, std::max<std::int64_t>(kernels::kFewRingBytes, 2 * stage)) / stage;
    }
    const std::int64_t most_stages = std::min<std::int64_t>(fit, kernels::kFewMaxStages);
    const int lanes = kernels::few_column_lanes(routed_.w2.promotion(), static_cast<int>(row));
    const std::int64_t streams = kernels::few_streams(p.stage_columns, lanes, static_cast<int>(most_stages));
    const std::int64_t all = std::int64_t{routes} * ceil_div(p.columns, p.stage_columns);
    p.stages = static_cast<int>(std::min(most_stages / streams, ceil_div(all, streams)) * streams);
    p.down = down(p.stages);
    return p;
  }

  kernels::Routes routes_of(const ForwardArgs& a) const {
    return {.topk_ids = a.topk_ids.data(),
            .ids_stride = a.topk_ids.strides()[0],
            .ids_are_64 = a.topk_ids.dtype() == DType::int64,
            .tokens = static_cast<std::int32_t>(a.topk_ids.dim(0)),
            .top_k = static_cast<std::int32_t>(a.topk_ids.dim(1)),
            .expert_map = expert_map_.as<std::int32_t>(),
            .id_limit = static_cast<std::int32_t>(id_limit_),
            .topk_weights = a.topk_weights.as<float>(),
            .weights_stride = a.topk_weights.strides()[0],
            .weight_on_input = weight_on_input_};
  }

  void launch_few(const ForwardArgs& a, const Plan& p, const Launcher& launcher, std::uint8_t* base) const {
    const FewPlan& few = p.few;
    const kernels::Routes routes = routes_of(a);
    auto* h = reinterpret_cast<std::uint16_t*>(base + p.memory.offset(p.few_h));
    launcher.stage("gate_up");
    launcher.exactly(*few_gate_up_,
                     {.grid = {static_cast<unsigned>(info_.multiprocessors)}, .shared_bytes = few.gate_up.bytes},
                     kernels::FewGateUpArgs{.routes = routes,
                                            .w13 = *routed_.w13.few(),
                                            .x = row_view(a.x),
                                            .h = h,
                                            .up_first = routed_.up_first,
                                            .limit = limit_,
                                            .layout = few.gate_up,
                                            .w2 = *routed_.w2.few(),
                                            .columns = few.columns,
                                            .stage_columns = few.stage_columns});
    launcher.stage("down");
    launcher.exactly(*few_down_,
                     {.grid = {static_cast<unsigned>(ceil_div(hidden_, few.columns))},
                      .shared_bytes = std::max(few.down.bytes, kernels::kFewDownMinSharedBytes)},
                     kernels::FewDownArgs{.routes = routes,
                                          .w2 = *routed_.w2.few(),
                                          .h = h,
                                          .out = a.out.data(),
                                          .out_stride = a.out.strides()[0],
                                          .out_type = out_type(a.out.dtype()),
                                          .accumulate = a.accumulate,
                                          .columns = few.columns,
                                          .stage_columns = few.stage_columns,
                                          .stages = few.stages,
                                          .layout = few.down});
    launcher.stage(nullptr);
  }

  void launch_all(const ForwardArgs& a, const Plan& p, const Launcher& launcher) {
    auto* base = static_cast<std::uint8_t*>(workspaces_.choose(a.workspace, p.memory.bytes(), a.stream));
    if (launcher.observer() != nullptr) launcher.observer()->on_plan(p.memory.bytes(), p.memory.live_bytes());
    if (p.few.stages > 0) return launch_few(a, p, launcher, base);
    const std::int64_t tokens = p.tokens;
    const bool adds =
        may_add(a) && routed_.w2.can_add(likely_rows(p.rows)) && (!shared_ || shared_->w2.can_add(tokens));
    const auto at = [&]<class T>(int buffer, T*) -> T* {
      return buffer < 0 ? nullptr : reinterpret_cast<T*>(base + p.memory.offset(buffer));
    };
    const auto ints = [&](int buffer) { return at(buffer, static_cast<std::int32_t*>(nullptr)); };
    const auto floats = [&](int buffer) { return at(buffer, static_cast<float*>(nullptr)); };
    const auto rows_of = [&](const RowBuffers& r) {
      return QuantizedRows{at(r.q, static_cast<std::int8_t*>(nullptr)), floats(r.scale), ints(r.block_q), ints(r.zero),
                           r.rows};
    };

    // The shared experts' rows of tokens are a group of their own: its offsets come from the sort too.
    launcher.stage("sort");
    sort(launcher, a, p, base);
    const kernels::RowView x = row_view(a.x);
    const QuantizedRows xq = rows_of(p.x);
    launcher.stage("quantise x");
    // Beside the sort, which has waited for all that came before it; so the GEMM that follows may not look at the
    // sort's offsets before it has waited.
    const auto out_bytes = static_cast<std::int64_t>(size_bytes(a.out.dtype()));
    const bool clears = adds && !a.accumulate;
    routed_.w13.quantize(launcher, x, tokens, nullptr, xq, {.beside_last = true, .next_early = true}, false,
                         {clears ? a.out.data() : nullptr, a.out.strides()[0] * out_bytes, hidden_ * out_bytes});
    if (shared_) {
      if (shared_gate_.defined()) {
        launcher.stage("shared gate");
        const kernels::SharedGateArgs args{x, shared_gate_.as<float>(), floats(p.shared_weight),
                                           static_cast<std::int32_t>(tokens), static_cast<std::int32_t>(hidden_)};
        launcher(*gate_kernel_, tokens, args);
      }
      QuantizedRows sx = xq;
      if (p.shared_x.q >= 0) {
        sx = rows_of(p.shared_x);
        launcher.stage("quantise x");
        shared_->w13.quantize(launcher, x, tokens, nullptr, sx);
      }
      DeviceMatrix::Problem first;
      first.a = sx;
      first.index = ints(p.token_offsets);
      first.taken = ints(p.token_offsets) + 2;
      first.index_late = true;
      first.rows = tokens;
      if (adds) first.added = AddedRows{nullptr, floats(p.shared_weight)};
      run_expert(launcher, *shared_, p.shared, base, p, first, ints(p.token_offsets) + 1, tokens, a.out);
    }
    DeviceMatrix::Problem first;
    first.a = xq;
    first.row_source = ints(p.row_token);
    if (!fused_gather_) {
      first.a = rows_of(p.gathered);
      first.row_source = nullptr;
      launcher.stage("gather");
      gather(launcher, p, xq, first.a, ints(p.row_token), ints(p.offsets) + experts_);
    }
    first.index = ints(p.offsets);
    first.taken = ints(p.offsets) + experts_ + 1;
    first.index_late = !shared_;
    if (first.index_late && p.rows <= kernels::kCountedRoutes) first.routes = routes_of(a);
    first.rows = p.rows;
    first.likely_rows = likely_rows(p.rows);
    if (weight_on_input_) first.row_factor = floats(p.row_factor);
    if (adds) first.added = AddedRows{ints(p.row_token), weight_on_input_ ? nullptr : floats(p.row_factor)};
    run_expert(launcher, routed_, p.routed, base, p, first, ints(p.offsets) + experts_, p.rows, a.out);
    if (adds) return launcher.stage(nullptr);

    const kernels::CombineArgs args{
        .y = at(p.routed.y, static_cast<std::uint16_t*>(nullptr)),
        .route_row = ints(p.route_row),
        .topk_weights = weight_on_input_ ? nullptr : a.topk_weights.as<float>(),
        .weights_stride = a.topk_weights.strides()[0],
        .shared_y = at(p.shared.y, static_cast<std::uint16_t*>(nullptr)),
        .shared_weight = floats(p.shared_weight),
        .out = a.out.data(),
        .out_stride = a.out.strides()[0],
        .out_type = out_type(a.out.dtype()),
        .out_aligned = rows_are_aligned(a.out),
        .accumulate = a.accumulate,
        .tokens = static_cast<std::int32_t>(tokens),
        .top_k = p.top_k,
        .hidden = static_cast<std::int32_t>(hidden_),
        .read_once = drops_y(p.rows),
    };
    launcher.stage("combine");
    launcher(*combine_, ceil_div(tokens * hidden_ / 8, 256), args);
    launcher.stage(nullptr);
  }

  RowBuffers add_rows(Plan& p, const DeviceMatrix& m, std::int64_t rows, int first, int last) const {
    const ScaleColumns c = m.scale_columns();
    RowBuffers b;
    b.rows = rows;
    b.q = p.memory.add(rows * m.k(), first, last);
    b.scale = p.memory.add(rows * c.scale * 4, first, last);
    if (c.block_q > 0) b.block_q = p.memory.add(rows * c.block_q * 4, first, last);
    if (m.scheme().asymmetric) b.zero = p.memory.add(rows * 4, first, last);
    return b;
  }

  // Buffers between an expert's input and its y. All its steps may be one (the shared expert's). Of `all` routes, of
  // any expert, `here` are likely to be this one's: a rank has a part of them.
  ExpertBuffers add_expert(Plan& p, const Expert& e, std::int64_t rows, std::int64_t here, std::int64_t all, int gemm1,
                           int activate, int quantize, int gemm2) const {
    ExpertBuffers b;
    b.w13 = &e.first(std::max<std::int64_t>(1, rows * here / all));
    const std::int64_t width = e.w13.n();
    if (!e.fused) b.v = p.memory.add(rows * width * 4, gemm1, activate);
    // Also where GEMM1 quantises h: a caller's workspace may serve calls with fewer rows, for which it does not.
    std::int64_t h_rows = rows;
    if (b.requantizes()) h_rows = e.narrow_w13 ? std::min(rows, (e.w13.most_idle_rows() + 1) * all / here) : 0;
    if (h_rows > 0) b.h = p.memory.add(h_rows * e.intermediate * 2, e.fused ? gemm1 : activate, quantize);
    const RowBuffers h = add_rows(p, e.w2, rows, b.requantizes() ? gemm1 : quantize, gemm2);
    b.hq = h.q;
    b.h_scale = h.scale;
    b.h_block_q = h.block_q;
    b.h_zero = h.zero;
    b.y = p.memory.add(rows * hidden_ * 2, gemm2, kCombine);
    return b;
  }

  bool shares_input() const {
    return routed_.w13.scheme() == shared_->w13.scheme() && routed_.w13.static_scale() == shared_->w13.static_scale();
  }

  Plan plan(std::int64_t tokens, int top_k) const {
    Plan p;
    p.tokens = tokens;
    p.top_k = top_k;
    p.rows = tokens * top_k;
    if (p.rows > std::numeric_limits<std::int32_t>::max() / 2) {
      bad_argument("x: expected at most {} routes (tokens x top_k) in a call, got {} x {}",
                   std::numeric_limits<std::int32_t>::max() / 2, tokens, top_k);
    }
    p.offsets = p.memory.add((experts_ + 1 + kernels::kTakenWords) * 4, kSort, kGemm2);
    // The sort's last step is beside the first of those that follow.
    if (sort_chunks(p.rows) > 1 && !sorts_by_cluster(p.rows))
      p.chunk_counts = p.memory.add(sort_chunks(p.rows) * experts_ * 4, kSort, kQuantizeX);
    p.row_token = p.memory.add(p.rows * 4, kSort, any_order_ ? kGemm2 : kGemm1);
    p.route_row = p.memory.add(p.rows * 4, kSort, kCombine);
    if (weight_on_input_) {
      p.row_factor = p.memory.add(p.rows * 4, kSort, kGemm1);
    } else if (any_order_) {
      p.row_factor = p.memory.add(p.rows * 4, kSort, kGemm2);
    }
    p.x = add_rows(p, routed_.w13, tokens, kQuantizeX, fused_gather_ ? kGemm1 : kGather);
    if (!fused_gather_) p.gathered = add_rows(p, routed_.w13, p.rows, kGather, kGemm1);
    if (shared_) {
      p.token_offsets = p.memory.add((2 + kernels::kTakenWords) * 4, kSort, kQuantizeX);
      if (shared_gate_.defined()) p.shared_weight = p.memory.add(tokens * 4, kQuantizeX, kCombine);
      if (!shares_input()) p.shared_x = add_rows(p, shared_->w13, tokens, kQuantizeX, kQuantizeX);
      p.shared = add_expert(p, *shared_, tokens, 1, 1, kQuantizeX, kQuantizeX, kQuantizeX, kQuantizeX);
    }
    p.routed = add_expert(p, routed_, p.rows, experts_, id_limit_, kGemm1, kActivate, kQuantizeH, kGemm2);
    p.few = plan_few(tokens, top_k);
    // Also where this call is none for them: a caller's workspace may serve smaller ones.
    if (few_gate_up_ != nullptr) {
      const std::int64_t most = std::min<std::int64_t>(kernels::kFewTokens * top_k, kernels::kFewRoutes);
      p.few_h = p.memory.add(std::min(p.rows, most) * routed_.intermediate * 2, kFew, kFew);
    }
    p.memory.place();
    return p;
  }

  static std::int64_t sort_chunks(std::int64_t routes) { return ceil_div(routes, kernels::kSortChunk); }
  bool sorts_by_cluster(std::int64_t routes) const {
    return cluster_sort_ != nullptr && routes > kernels::kSortChunk && routes <= kernels::kClusterSortRoutes;
  }

  void sort(const Launcher& launcher, const ForwardArgs& a, const Plan& p, std::uint8_t* base) const {
    const auto ints = [&](int b) {
      return b < 0 ? nullptr : reinterpret_cast<std::int32_t*>(base + p.memory.offset(b));
    };
    const kernels::SortArgs args{
        .routes = routes_of(a),
        .experts = static_cast<std::int32_t>(experts_),
        .expert_offsets = ints(p.offsets),
        .row_token = ints(p.row_token),
        .route_row = ints(p.route_row),
        .row_factor = reinterpret_cast<float*>(ints(p.row_factor)),
        .token_offsets = ints(p.token_offsets),
        .chunks = static_cast<std::int32_t>(sort_chunks(p.rows)),
        .chunk_counts = ints(p.chunk_counts),
    };
    if (sorts_by_cluster(p.rows)) {
      return launcher.exactly(*cluster_sort_,
                              {.grid = {kernels::kSortCluster},
                               .shared_bytes = kernels::cluster_sort_bytes(args.experts),
                               .cluster = kernels::kSortCluster},
                              args);
    }
    if (args.chunks > 1) launcher(*count_, args.chunks, args, false);
    launcher(*sort_, args.chunks, args, false);
  }

  void gather(const Launcher& launcher, const Plan& p, const QuantizedRows& from, const QuantizedRows& to,
              const std::int32_t* row_token, const std::int32_t* row_count) const {
    const ScaleColumns c = routed_.w13.scale_columns();
    const kernels::GatherRowsArgs args{
        .q = from.q,
        .scale = from.scale,
        .block_q = from.block_q,
        .zero = from.zero,
        .row_token = row_token,
        .row_count = row_count,
        .q_out = to.q,
        .scale_out = to.scale,
        .block_q_out = to.block_q,
        .zero_out = to.zero,
        .tokens = p.tokens,
        .rows = static_cast<std::int32_t>(p.rows),
        .k = static_cast<std::int32_t>(hidden_),
        .columns = static_cast<std::int32_t>(c.scale),
        .q_columns = static_cast<std::int32_t>(c.block_q),
    };
    launcher(*gather_, p.rows, args);
  }

  // From quantised rows (first.a) to y or, where first.added says where, to rows of out. row_count: on the device.
  void run_expert(const Launcher& launcher, const Expert& e, const ExpertBuffers& b, std::uint8_t* base, const Plan& p,
                  DeviceMatrix::Problem first, const std::int32_t* row_count, std::int64_t rows,
                  const TensorView& out) const {
    const auto at = [&](int buffer) { return buffer < 0 ? nullptr : base + p.memory.offset(buffer); };
    auto* h = reinterpret_cast<std::uint16_t*>(at(b.h));
    const QuantizedRows hq{reinterpret_cast<std::int8_t*>(at(b.hq)), reinterpret_cast<float*>(at(b.h_scale)),
                           reinterpret_cast<std::int32_t*>(at(b.h_block_q)),
                           reinterpret_cast<std::int32_t*>(at(b.h_zero)), rows};
    first.read_next = true;
    DeviceMatrix::Problem second = first;
    ++second.taken;
    second.index_late = false;
    second.routes = {};
    first.added.reset();
    first.up_first = e.up_first;
    first.limit = limit_;
    first.out = b.requantizes() ? static_cast<void*>(hq.q) : e.fused ? static_cast<void*>(h) : at(b.v);
    first.out_scale = hq.scale;
    first.out_rows = hq.rows;
    first.out_stride = e.fused ? e.intermediate : e.w13.n();
    first.out_type = e.fused ? kernels::OutType::bf16 : kernels::OutType::f32;
    const bool drops_h = !b.requantizes() && e.w2.drops_lines() &&
                         stays_in_l2((first.likely_rows > 0 ? first.likely_rows : rows) * e.intermediate);
    first.keep_out = e.fused && drops_h;
    launcher.stage("gemm1");
    b.w13->gemm(launcher, first);
    if (!e.fused) {
      const kernels::ActivateArgs args{
          .v = reinterpret_cast<const float*>(at(b.v)),
          .h = h,
          .row_count = row_count,
          .rows = static_cast<std::int32_t>(rows),
          .width = static_cast<std::int32_t>(e.intermediate),
          .gated = is_gated(e.activation),
          .up_first = e.up_first,
          .act = static_cast<kernels::Act>(e.activation),
          .alpha = alpha_,
          .limit = limit_,
      };
      launcher.stage("activate");
      launcher(*activate_, ceil_div(rows * e.intermediate / 4, 256), args);
    }
    if (!b.requantizes()) {
      launcher.stage("quantise h");
      // GEMM2 begins with its weights while GEMM1's last tiles are computed.
      e.w2.quantize(launcher, {h, e.intermediate, kernels::RowType::bf16, 1}, rows, row_count, hq, {.next_early = true},
                    drops_h);
    }
    second.a = hq;
    second.row_source = nullptr;
    second.row_factor = nullptr;
    if (second.added) {
      second.out = out.data();
      second.out_stride = out.strides()[0];
      second.out_type = out_type(out.dtype());
      second.keep_out = true;
    } else {
      second.out = at(b.y);
      second.out_stride = hidden_;
      second.keep_out = &e == &routed_ && drops_y(p.rows);
    }
    launcher.stage("gemm2");
    e.w2.gemm(launcher, second);
  }

  const DeviceInfo& info_;
  std::int64_t hidden_, experts_;
  bool weight_on_input_, any_order_, fused_gather_;
  float alpha_, limit_;
  std::int64_t id_limit_;
  Expert routed_;
  std::optional<Expert> shared_;
  Tensor expert_map_, shared_gate_;
  const LoadedKernel *count_ = nullptr, *sort_ = nullptr, *cluster_sort_ = nullptr, *combine_ = nullptr,
                     *gate_kernel_ = nullptr, *activate_ = nullptr, *gather_ = nullptr, *few_gate_up_ = nullptr,
                     *few_down_ = nullptr;
  Workspaces workspaces_;
  Recent<Kind> recent_;
  LaunchList list_;  // of the last call
  Plan plan_;        // of the last call that was not of a kept kind
  struct Size {
    std::int64_t tokens = -1;
    int top_k = 0;
    std::size_t bytes = 0;
  };
  mutable Size size_;  // workspace_bytes()'s last answer
};

}  // namespace

std::unique_ptr<LayerBackend> make_layer(Device device, MoeWeights weights, const LayerOptions& options) {
  return std::make_unique<CudaLayer>(device.index, std::move(weights), options);
}

}  // namespace octomoe::cuda
