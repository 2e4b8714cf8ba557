#include "cpu/layer.h"

#include <algorithm>
#include <utility>

#include "cpu/carver.h"
#include "cpu/ops.h"
#include "quant/matrix.h"
#include "quant/numerics.h"

namespace octomoe::cpu {
namespace {

constexpr std::int64_t kChunkRows = 32768;  // routes of a chunk: 256 rows an expert for 128 experts, arithmetic rules

DType between(const Scheme& s) { return s.kind == SchemeKind::fp16 ? DType::float16 : DType::bfloat16; }

ActivationStep activation_step(Activation kind, const LayerOptions& o) {
  ActivationStep step;
  step.kind = kind;
  step.alpha = o.swiglu_alpha;
  if (o.swiglu_limit)
    step.limit = *o.swiglu_limit;
  else if (kind == Activation::swigluoai)
    step.limit = 7.0f;
  return step;
}

// Each matrix's natural layout is dropped as soon as it is packed, unless somebody else holds it.
Expert pack_expert(MoeWeights w, const LayerOptions& o, Isa isa, ThreadPool& pool) {
  Expert e;
  PackOptions first{is_gated(w.activation), w.gate_up_order, w.b13, isa};
  e.w13 = pack(w.w13, first, pool);
  w.w13 = {};
  e.w2 = pack(w.w2, {false, GateUpOrder::gate_up, w.b2, isa}, pool);
  e.activation = activation_step(w.activation, o);
  return e;
}

std::int64_t id_at(const TensorView& ids, std::int64_t t, std::int64_t j) {
  const std::int64_t offset = t * ids.strides()[0] + j * ids.strides()[1];
  return ids.dtype() == DType::int32 ? ids.as<std::int32_t>()[offset] : ids.as<std::int64_t>()[offset];
}

std::uint8_t* row_of(const TensorView& t, std::int64_t row) {
  return t.as<std::uint8_t>() + row * t.strides()[0] * static_cast<std::int64_t>(size_bytes(t.dtype()));
}

// fn(begin, end, thread) over runs of [0, count) that are long enough to be worth a hand-out.
template <class Fn>
void for_runs(ThreadPool& pool, std::int64_t count, const Fn& fn) {
  const std::int64_t run = std::clamp<std::int64_t>(count / (8 * pool.threads()), 1, 64);
  pool.parallel_for(ceil_div(count, run), [&](std::int64_t i, int thread) {
    const FloatEnv env;
    fn(i * run, std::min(count, i * run + run), thread);
  });
}

}  // namespace

struct CpuLayer::Plan {
  std::int64_t tokens;
  int top_k, slots;           // slots: with the shared expert
  std::int64_t routed, rows;  // most rows of routed experts, and of all
  std::size_t max_tasks, thread_bytes;
};

struct CpuLayer::Chunk {
  std::int64_t first, count;  // tokens
  const ForwardArgs* args;
};

// Two regions hold the big arrays in turn: h8 stands alone, x8 and h are dead when y begins.
struct CpuLayer::Buffers {
  std::uint8_t* threads;    // thread_bytes each
  std::int32_t* expert_of;  // [T][k] local expert or -1
  std::int32_t* token;      // [rows] of each sorted row
  std::int64_t* dest;       // [rows] its place in y: token * slots + slot
  float* input_weight;      // [rows], only with the router weight on the input
  std::int64_t* offset;     // [E + 1] first sorted row of each expert
  Group* groups;            // [E + 1]
  Task* tasks;
  float* shared_weight;             // [T]
  RowSet x, shared_x, h, shared_h;  // quantised
  std::uint8_t *h_rows, *shared_h_rows, *y;
};

CpuLayer::CpuLayer(MoeWeights weights, const LayerOptions& o)
    : hidden_(weights.hidden()),
      weight_on_input_(o.router_weight_on_input),
      between_(between(weights.scheme)),
      expert_map_(o.expert_map),
      pool_(o.threads) {
  const Isa isa = best_isa();
  if (o.keep_weights) kept_ = weights;
  routed_ = pack_expert(std::move(weights), o, isa, pool_);
  if (o.shared_expert) shared_ = pack_expert(*o.shared_expert, o, isa, pool_);
  if (o.shared_gate.defined()) {
    shared_gate_.resize(static_cast<std::size_t>(o.shared_gate.elems()));
    to_float(o.shared_gate.view().data(), o.shared_gate.dtype(), o.shared_gate.elems(), shared_gate_.data());
  }
}

bool CpuLayer::per_route() const {
  const auto& s = routed_.w13.static_scale;
  return routed_.w13.scheme.activation_scale == ActivationScale::static_ &&
         std::any_of(s.begin(), s.end(), [&](float v) { return v != s.front(); });
}

bool CpuLayer::shares_input() const {
  const PackedMatrix &a = routed_.w13, &b = shared_->w13;
  return !per_route() && a.scheme == b.scheme && a.static_scale_of(0) == b.static_scale_of(0);
}

CpuLayer::Plan CpuLayer::plan(std::int64_t tokens, int top_k) const {
  Plan p{};
  p.top_k = top_k;
  p.slots = top_k + (shared_ ? 1 : 0);
  p.tokens = std::min(tokens, std::max<std::int64_t>(1, kChunkRows / p.slots));
  p.routed = p.tokens * top_k;
  p.rows = p.tokens * p.slots;
  const int threads = pool_.threads();
  const auto grow = [&](const Expert& e, std::int64_t rows, std::int64_t groups) {
    // Both GEMMs use the same task list and scratch, one after the other; a row of floats is needed in between.
    p.max_tasks += std::max(cpu::max_tasks(e.w13, rows, groups, threads), cpu::max_tasks(e.w2, rows, groups, threads));
    const auto floats = static_cast<std::size_t>(round_up(std::max(e.w13.k, e.w2.k), 16)) * sizeof(float);
    p.thread_bytes = std::max({p.thread_bytes, scratch_bytes(e.w13, rows), scratch_bytes(e.w2, rows), floats});
  };
  grow(routed_, p.routed, std::min(p.routed, routed_.w13.experts));
  if (shared_) grow(*shared_, p.tokens, 1);
  // combine_tokens keeps a pointer and a weight of each slot there.
  p.thread_bytes = std::max(p.thread_bytes, static_cast<std::size_t>(p.slots) * 16 + 128);
  return p;
}

std::size_t CpuLayer::carve(const Plan& p, std::uint8_t* base, Buffers* buffers) const {
  Carver c(base);
  Buffers b{};
  const std::int64_t experts = routed_.w13.experts;
  b.threads = c.take<std::uint8_t>(static_cast<std::int64_t>(p.thread_bytes) * pool_.threads());
  b.expert_of = c.take<std::int32_t>(p.routed);
  b.token = c.take<std::int32_t>(p.rows);
  b.dest = c.take<std::int64_t>(p.rows);
  if (weight_on_input_) b.input_weight = c.take<float>(p.rows);
  b.offset = c.take<std::int64_t>(experts + 1);
  b.groups = c.take<Group>(experts + 1);
  b.tasks = c.take<Task>(static_cast<std::int64_t>(p.max_tasks));
  if (shared_) b.shared_weight = c.take<float>(p.tokens);

  const bool integers = routed_.w2.row_scales() > 0;  // bf16 and fp16 multiply h as it is
  const auto rows = [&](const PackedMatrix& m, std::int64_t count, RowSet* set) {
    std::uint8_t* at = c.take<std::uint8_t>(static_cast<std::int64_t>(row_set_bytes(m, count)));
    if (base) *set = lay_out_rows(m, count, at);
  };
  if (integers) {
    rows(routed_.w2, p.routed, &b.h);
    if (shared_) rows(shared_->w2, p.tokens, &b.shared_h);
  } else {
    b.h_rows = c.take<std::uint8_t>(p.routed * routed_.w2.k * 2);
    if (shared_) b.shared_h_rows = c.take<std::uint8_t>(p.tokens * shared_->w2.k * 2);
  }
  const std::size_t second = c.used();
  rows(routed_.w13, per_route() ? p.routed : p.tokens, &b.x);
  if (shared_ && !shares_input()) rows(shared_->w13, p.tokens, &b.shared_x);
  if (integers) {
    b.h_rows = c.take<std::uint8_t>(p.routed * routed_.w2.k * 2);
    if (shared_) b.shared_h_rows = c.take<std::uint8_t>(p.tokens * shared_->w2.k * 2);
  }
  const std::size_t first_end = c.used();
  c.rewind(second);
  b.y = c.take<std::uint8_t>(p.rows * hidden_ * 2);
  if (buffers) *buffers = b;
  return std::max(first_end, c.used());
}

std::size_t CpuLayer::workspace_bytes(std::int64_t tokens, int top_k) const {
  return tokens == 0 ? 0 : carve(plan(tokens, top_k), nullptr, nullptr);
}

void CpuLayer::reserve(std::int64_t max_tokens, int top_k) {
  const std::size_t bytes = workspace_bytes(max_tokens, top_k);
  if (bytes <= workspace_.size()) return;
  workspace_ = {};  // the old one first: the two are never alive together
  workspace_ = HugeBuffer(bytes);
}

// Counting sort, stable: rows of an expert are in token order. The shared expert's rows come last, one per token.
void CpuLayer::sort_routes(const Plan& p, const Chunk& chunk, Buffers& b) const {
  const ForwardArgs& a = *chunk.args;
  const std::int64_t experts = routed_.w13.experts;
  const auto* map = expert_map_.defined() ? expert_map_.as<std::int32_t>() : nullptr;
  std::fill_n(b.offset, experts + 1, 0);
  for (std::int64_t t = 0; t < chunk.count; ++t) {
    for (int j = 0; j < p.top_k; ++j) {
      std::int64_t e = id_at(a.topk_ids, chunk.first + t, j);
      if (e >= 0 && map) e = map[e];
      b.expert_of[t * p.top_k + j] = static_cast<std::int32_t>(e);
      if (e >= 0) ++b.offset[e + 1];
    }
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    b.offset[e + 1] += b.offset[e];
    b.groups[e] = {0, static_cast<std::int32_t>(e), b.offset[e], b.offset[e + 1] - b.offset[e]};
  }
  const auto put = [&](std::int64_t row, std::int64_t t, int slot, float weight) {
    b.token[row] = static_cast<std::int32_t>(t);
    b.dest[row] = t * p.slots + slot;
    if (b.input_weight) b.input_weight[row] = weight;
  };
  // offset[e] runs to the end of e's rows, which is where offset[e + 1] stood: shift back afterwards.
  for (std::int64_t t = 0; t < chunk.count; ++t) {
    for (int j = 0; j < p.top_k; ++j) {
      const std::int32_t e = b.expert_of[t * p.top_k + j];
      if (e < 0) continue;
      const TensorView& w = a.topk_weights;
      put(b.offset[e]++, t, j, w.as<float>()[(chunk.first + t) * w.strides()[0] + j * w.strides()[1]]);
    }
  }
  for (std::int64_t e = experts; e > 0; --e) b.offset[e] = b.offset[e - 1];
  b.offset[0] = 0;
  if (!shared_) return;
  for (std::int64_t t = 0; t < chunk.count; ++t) put(p.routed + t, t, p.top_k, 1.0f);
  b.groups[experts] = {1, 0, 0, chunk.count};
}

void CpuLayer::quantize_inputs(const Plan& p, const Chunk& chunk, Buffers& b) {
  const TensorView& x = chunk.args->x;
  const auto float_row = [&](std::int64_t t, int thread) {
    auto* row = reinterpret_cast<float*>(b.threads + p.thread_bytes * static_cast<std::size_t>(thread));
    to_float(row_of(x, chunk.first + t), x.dtype(), hidden_, row);
    return row;
  };
  const bool each_token = !per_route();
  if (each_token || shared_) {
    for_runs(pool_, chunk.count, [&](std::int64_t begin, std::int64_t end, int thread) {
      for (std::int64_t t = begin; t < end; ++t) {
        const float* row = float_row(t, thread);
        if (each_token) quantize_row(routed_.w13, row, routed_.w13.static_scale_of(0), b.x, t);
        if (!shared_) continue;
        if (!shares_input()) quantize_row(shared_->w13, row, shared_->w13.static_scale_of(0), b.shared_x, t);
        b.shared_weight[t] = shared_gate_.empty() ? 1.0f : num::sigmoid(gate_dot(row, shared_gate_.data(), hidden_));
      }
    });
  }
  if (each_token) return;
  for_runs(pool_, b.offset[routed_.w13.experts], [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t t = b.token[r], slot = b.dest[r] - t * p.slots;
      const std::int32_t e = b.expert_of[t * p.top_k + slot];
      quantize_row(routed_.w13, float_row(t, thread), routed_.w13.static_scale_of(e), b.x, r);
    }
  });
}

void CpuLayer::quantize_hidden(const Plan& p, Buffers& b) {
  const auto run = [&](const Expert& e, const RowSet& set, const std::uint8_t* h, std::int64_t row, std::int64_t expert,
                       int thread) {
    auto* floats = reinterpret_cast<float*>(b.threads + p.thread_bytes * static_cast<std::size_t>(thread));
    to_float(h + row * e.w2.k * 2, between_, e.w2.k, floats);
    quantize_row(e.w2, floats, e.w2.static_scale_of(expert), set, row);
  };
  for_runs(pool_, b.offset[routed_.w13.experts], [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t t = b.token[r];
      run(routed_, b.h, b.h_rows, r, b.expert_of[t * p.top_k + (b.dest[r] - t * p.slots)], thread);
    }
  });
  if (!shared_) return;
  for_runs(pool_, b.groups[routed_.w13.experts].rows, [&](std::int64_t begin, std::int64_t end, int thread) {
    for (std::int64_t r = begin; r < end; ++r) run(*shared_, b.shared_h, b.shared_h_rows, r, 0, thread);
  });
}

void CpuLayer::multiply(bool second, const Plan& p, Buffers& b) {
  const auto plain = [&](const PackedMatrix& m, std::uint8_t* h) {
    RowSet set;
    set.values = h;
    set.stride_bytes = m.k * 2;
    return set;
  };
  const auto product = [&](const Expert& e, bool shared) {
    Product g;
    g.out_dtype = between_;
    g.b = second ? &e.w2 : &e.w13;
    if (!g.b->bias.empty()) g.bias = g.b->bias.data();
    if (!second) {
      g.a = shared && !shares_input() ? b.shared_x : b.x;
      g.source = shared || per_route() ? nullptr : b.token;
      if (weight_on_input_ && !shared) g.factor = b.input_weight;
      g.out = shared ? b.shared_h_rows : b.h_rows;
      g.out_stride_bytes = e.w2.k * 2;
      g.activation = e.activation;
      return g;
    }
    g.a = shared ? b.shared_h : b.h;
    if (e.w2.row_scales() == 0) g.a = plain(e.w2, shared ? b.shared_h_rows : b.h_rows);
    g.out = b.y;
    g.out_stride_bytes = hidden_ * 2;
    g.dest = b.dest + (shared ? p.routed : 0);
    return g;
  };
  Product products[2] = {product(routed_, false), {}};
  if (shared_) products[1] = product(*shared_, true);
  const std::int64_t count =
      make_tasks(products, b.groups, routed_.w13.experts + (shared_ ? 1 : 0), pool_.threads(), b.tasks);
  pool_.parallel_for(count, [&](std::int64_t i, int thread) {
    const FloatEnv env;
    run_task(products[b.tasks[i].product], b.tasks[i], b.threads + p.thread_bytes * static_cast<std::size_t>(thread));
  });
}

void CpuLayer::combine_tokens(const Plan& p, const Chunk& chunk, Buffers& b) {
  const ForwardArgs& a = *chunk.args;
  for_runs(pool_, chunk.count, [&](std::int64_t begin, std::int64_t end, int thread) {
    // slots pointers and weights, in the thread's scratch.
    Carver c(b.threads + p.thread_bytes * static_cast<std::size_t>(thread));
    const void** y = c.take<const void*>(p.slots);
    float* weight = c.take<float>(p.slots);
    for (std::int64_t t = begin; t < end; ++t) {
      int count = 0;
      for (int j = 0; j < p.slots; ++j) {
        const bool shared = j == p.top_k;
        if (!shared && b.expert_of[t * p.top_k + j] < 0) continue;
        const TensorView& w = a.topk_weights;
        y[count] = b.y + (t * p.slots + j) * hidden_ * 2;
        if (shared)
          weight[count] = b.shared_weight[t];
        else
          weight[count] =
              weight_on_input_ ? 1.0f : w.as<float>()[(chunk.first + t) * w.strides()[0] + j * w.strides()[1]];
        ++count;
      }
      combine({y, weight, count, between_, hidden_, row_of(a.out, chunk.first + t), a.out.dtype(), a.accumulate});
    }
  });
}

void CpuLayer::forward(const ForwardArgs& args) {
  const std::int64_t tokens = args.x.dim(0);
  if (tokens == 0) return;
  const int top_k = static_cast<int>(args.topk_ids.dim(1));
  reserve(tokens, top_k);
  const FloatEnv env;
  const Plan p = plan(tokens, top_k);
  Buffers b;
  carve(p, workspace_.as<std::uint8_t>(), &b);
  for (std::int64_t first = 0; first < tokens; first += p.tokens) {
    const Chunk chunk{first, std::min(p.tokens, tokens - first), &args};
    sort_routes(p, chunk, b);
    quantize_inputs(p, chunk, b);
    multiply(false, p, b);
    if (routed_.w2.row_scales() > 0) quantize_hidden(p, b);
    multiply(true, p, b);
    combine_tokens(p, chunk, b);
  }
}

std::unique_ptr<LayerBackend> make_layer(MoeWeights weights, const LayerOptions& options) {
  return std::make_unique<CpuLayer>(std::move(weights), options);
}

}  // namespace octomoe::cpu
