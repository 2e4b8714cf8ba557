// The kernels around the GEMMs (kernels/quant, kernels/route) against the reference, the CPU engine or plain loops, bit
// for bit.
#include <gtest/gtest.h>

#include "cpu/ops.h"
#include "emulator/kernel_table.h"
#include "emulator/problem.h"
#include "octomoe/layer.h"
#include "plan/catalogue.h"
#include "quant/reference.h"
#include "support/random.h"

namespace octomoe::emulator {
namespace {

using kernels::OutType;
using kernels::RowScheme;
using kernels::RowType;
using kernels::RowView;
using testing::random_tensor;

RowType row_type(DType t) {
  return t == DType::float32 ? RowType::f32 : t == DType::float16 ? RowType::fp16 : RowType::bf16;
}
constexpr DType kTypes[] = {DType::float32, DType::float16, DType::bfloat16};

void run(
    int grid, int threads, const std::function<void()>& kernel, int shared_bytes = 0, int cluster = 1,
    const std::function<void()>& before = [] {}) {
  for (const std::uint32_t seed : {0u, 5u}) {
    before();
    try {
      launch({.grid = grid,
              .threads = threads,
              .shared_bytes = shared_bytes,
              .cluster = cluster,
              .schedule = {.seed = seed}},
             kernel);
    } catch (const Fault& fault) {
      FAIL() << "seed " << seed << ": " << fault.what();
    }
  }
}

// ---- quantize_rows ----
struct QuantizeCase {
  int rows, k, block_k = 128, super_group = 3;
  DType type = DType::bfloat16;
  bool aligned = true, read_once = false;
  int clear = 0;  // bytes of a row of another tensor
};

template <RowScheme S, int kRowThreads, int kPasses>
void check_quantize(const QuantizeCase& c) {
  SCOPED_TRACE(std::to_string(static_cast<int>(S)) + " k " + std::to_string(c.k));
  Scheme scheme;
  if (S == RowScheme::static_scale) scheme.activation_scale = ActivationScale::static_;
  scheme.asymmetric = S == RowScheme::asymmetric;
  if (S == RowScheme::block) scheme.kind = SchemeKind::int8_block;
  if (S == RowScheme::hybrid) scheme.kind = SchemeKind::int8_hybrid;
  scheme.block_k = c.block_k;
  scheme.super_group = c.super_group;
  constexpr bool kBlocks = S >= RowScheme::block;
  const float static_scale = 0.037f;

  // Rows apart by an odd number of elements where they are not aligned; an Inf and a NaN, a row of zeros.
  const std::int64_t stride = c.aligned ? c.k : c.k + 3;
  const Tensor x = random_tensor(c.type, {c.rows, stride}, static_cast<std::uint32_t>(c.k));
  const auto set = [&](std::int64_t row, std::int64_t column, float v) {
    reference::store(x.as<char>() + (row * stride + column) * static_cast<std::int64_t>(size_bytes(c.type)), c.type, v);
  };
  if (c.rows > 4) {
    for (int i = 0; i < c.k; ++i) set(1, i, 0.0f);
    set(2, c.k - 1, std::bit_cast<float>(0xff800000u));
    set(4, c.k / 2, std::bit_cast<float>(0x7fc00000u));
  }

  const auto blocks = static_cast<std::size_t>((c.k + c.block_k - 1) / c.block_k);
  const std::size_t scales = S == RowScheme::block    ? blocks
                             : S == RowScheme::hybrid ? (blocks + static_cast<std::size_t>(c.super_group) - 1) /
                                                            static_cast<std::size_t>(c.super_group)
                                                      : 1;
  // One row more than the device is to write, and a leading dimension of its own.
  const auto rows = static_cast<std::size_t>(c.rows), ld = rows + 5;
  const Memory<std::int8_t> q((rows + 1) * static_cast<std::size_t>(c.k));
  const Memory<float> scale(scales * ld);
  const Memory<std::int32_t> zero(ld), block_q(kBlocks ? blocks * ld : 1);
  const std::int32_t count = c.rows;
  // What is read once is worth nothing afterwards; there, rows begin at multiples of 128 bytes.
  const Memory<char> once(c.read_once ? x.bytes() : 0);
  // Rows that become zeros, each with 16 bytes behind it that do not.
  const std::size_t clear_stride = static_cast<std::size_t>(c.clear) + 16;
  const Memory<std::uint8_t> cleared(c.clear > 0 ? (rows + 1) * clear_stride : 0);
  std::fill_n(cleared.data(), cleared.size(), std::uint8_t{0x55});
  const kernels::QuantizeArgs args{
      .x = {c.read_once ? once.data() : x.view().data(), stride, row_type(c.type), c.aligned},
      .rows = c.rows + 1,
      .row_count = &count,
      .k = c.k,
      .q = q.data(),
      .scale = scale.data(),
      .zero = zero.data(),
      .block_q = block_q.data(),
      .rows_total = static_cast<std::int64_t>(ld),
      .static_scale = &static_scale,
      .block_k = c.block_k,
      .super_group = c.super_group,
      .q_max = scheme.q_max,
      .beside_last = 0,
      .next_early = 0,
      .read_once = c.read_once,
      .clear = cleared.data(),
      .clear_stride = static_cast<std::int64_t>(clear_stride),
      .clear_bytes = c.clear};
  std::memset(q.data(), 0x55, q.size());
  run(
      2, kernels::kQuantizeThreads, [&] { kernels::quantize_rows<S, kRowThreads, kPasses>(args); }, 0, 1,
      [&] {
        if (c.read_once) std::memcpy(once.data(), x.view().data(), x.bytes());
      });

  for (std::size_t r = 0; r < rows; ++r) {
    std::vector<float> row(static_cast<std::size_t>(c.k));
    for (std::size_t i = 0; i < row.size(); ++i) {
      row[i] = reference::load(x.as<char>() + (r * static_cast<std::size_t>(stride) + i) * size_bytes(c.type), c.type);
    }
    if (const std::size_t bytes = row.size() * size_bytes(c.type); c.read_once) {
      ASSERT_NE(std::memcmp(x.as<char>() + r * bytes, once.data() + r * bytes, bytes), 0) << "row " << r;
    }
    const reference::Row want = reference::quantize_row(scheme, row.data(), c.k, static_scale);
    ASSERT_EQ(std::memcmp(want.q.data(), q.data() + r * row.size(), row.size()), 0) << "row " << r;
    for (std::size_t b = 0; b < scales; ++b) {
      ASSERT_EQ(num::bits(want.scale[b]), num::bits(scale[b * ld + r])) << "row " << r << ", scale " << b;
    }
    if (S == RowScheme::asymmetric) {
      ASSERT_EQ(want.zero, zero[r]) << "row " << r;
    }
    for (std::size_t b = 0; S == RowScheme::hybrid && b < blocks; ++b) {
      ASSERT_EQ(want.block[b], block_q[b * ld + r]) << "row " << r << ", block " << b;
    }
  }
  for (std::size_t i = 0; i < cleared.size(); ++i) {
    const bool inside = i / clear_stride < rows && i % clear_stride < static_cast<std::size_t>(c.clear);
    ASSERT_EQ(cleared[i], inside ? 0 : 0x55) << "cleared byte " << i;
  }
  for (std::size_t i = 0; i < static_cast<std::size_t>(c.k); ++i)
    ASSERT_EQ(q[rows * static_cast<std::size_t>(c.k) + i], 0x55);
}
template <RowScheme S>
void check_quantize_sizes() {
  for (const DType type : kTypes) {
    check_quantize<S, 32, 4>({.rows = 21, .k = 272, .type = type});
    check_quantize<S, 32, 4>({.rows = 5, .k = 1024, .block_k = 32, .super_group = 256, .type = type, .aligned = false});
  }
  check_quantize<S, 32, 4>({.rows = 9, .k = 832, .read_once = true});
  check_quantize<S, 256, 4>({.rows = 5, .k = 4096, .block_k = 256, .read_once = true});
  check_quantize<S, 256, 1>({.rows = 5, .k = 1040});
  check_quantize<S, 256, 4>({.rows = 5, .k = 4112, .block_k = 96, .super_group = 7});
  check_quantize<S, 256, 0>({.rows = 5, .k = 8208, .block_k = 256, .super_group = 256, .aligned = false});
  check_quantize<S, 32, 4>({.rows = 1, .k = 16, .clear = 16});
  check_quantize<S, 32, 4>({.rows = 21, .k = 272, .type = DType::float32, .clear = 2 * 272});
  check_quantize<S, 256, 1>({.rows = 5, .k = 1040, .clear = 2 * 4624});
}
TEST(QuantizeRows, Channel) { check_quantize_sizes<RowScheme::channel>(); }
TEST(QuantizeRows, Static) { check_quantize_sizes<RowScheme::static_scale>(); }
TEST(QuantizeRows, Asymmetric) { check_quantize_sizes<RowScheme::asymmetric>(); }
TEST(QuantizeRows, Block) { check_quantize_sizes<RowScheme::block>(); }
TEST(QuantizeRows, Hybrid) { check_quantize_sizes<RowScheme::hybrid>(); }

// ---- activate_rows ----
TEST(ActivateRows, EveryActivation) {
  for (int a = 0; a <= static_cast<int>(Activation::none); ++a) {
    for (const bool up_first : {false, true}) {
      const auto kind = static_cast<Activation>(a);
      SCOPED_TRACE(to_string(kind));
      const bool gated = is_gated(kind);
      const std::int32_t rows = 9, width = 48, in_width = gated ? 2 * width : width;
      const Tensor v = random_tensor(DType::float32, {rows, in_width}, 3, 0.5f);
      v.as<float>()[5] = std::bit_cast<float>(0x7fc00000u);
      v.as<float>()[in_width + 7] = std::bit_cast<float>(0xff800000u);
      const Memory<std::uint16_t> h(static_cast<std::size_t>(rows) * width);
      LayerOptions options;
      options.swiglu_limit = 2.0f;
      const kernels::ActivateArgs args{.v = v.as<float>(),
                                       .h = h.data(),
                                       .row_count = &rows,
                                       .rows = rows + 3,
                                       .width = width,
                                       .gated = gated,
                                       .up_first = up_first,
                                       .act = static_cast<kernels::Act>(a),
                                       .alpha = options.swiglu_alpha,
                                       .limit = 2.0f};
      run(2, kernels::kActivateThreads, [&] { kernels::activate_rows(args); });
      for (std::int32_t r = 0; r < rows; ++r) {
        for (std::int32_t c = 0; c < width; ++c) {
          const float first = v.as<float>()[r * in_width + c],
                      second = gated ? v.as<float>()[r * in_width + width + c] : 0;
          const bool swap = gated && up_first;
          const float act = reference::activate(kind, swap ? second : first, swap ? first : second, options);
          ASSERT_EQ(h[static_cast<std::size_t>(r * width + c)], num::float_to_bf16(act))
              << "row " << r << " column " << c;
        }
      }
    }
  }
}

// ---- sort ----
TEST(Sort, RoutesByExpertThenToken) {
  for (const int tokens : {1, 7, 130, 700, 2500}) {
    for (const int variant : {0, 1, 2, 3}) {
      SCOPED_TRACE(std::to_string(tokens) + " tokens, variant " + std::to_string(variant));
      const int top_k = 3, global = tokens == 700 ? 700 : 10, experts = variant == 1 ? 4 : global, stride = top_k + 2;
      const bool cluster = variant == 3;  // of two CTAs
      const bool wide = variant == 2;
      std::mt19937 rng(static_cast<std::uint32_t>(tokens));
      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * stride));
      // Also what is no expert.
      for (std::int32_t& id : ids) id = static_cast<std::int32_t>(rng() % static_cast<unsigned>(global + 4)) - 2;
      const std::vector<std::int64_t> wide_ids(ids.begin(), ids.end());
      std::vector<std::int32_t> map(global);
      for (int e = 0; e < global; ++e) map[static_cast<std::size_t>(e)] = e % 3 == 0 ? 3 - e / 3 % 4 : -1;
      const Tensor weights = testing::random_topk_weights(tokens, stride, 4);
      const auto local = [&](int token, int slot) {
        const std::int32_t id = ids[static_cast<std::size_t>(token * stride + slot)];
        if (id < 0 || id >= global) return -1;
        return variant == 1 ? map[static_cast<std::size_t>(id)] : id;
      };
      std::vector<std::int32_t> offsets{0}, row_token, route_row(static_cast<std::size_t>(tokens * top_k), -1);
      std::vector<float> factor;
      for (int e = 0; e < experts; ++e) {
        for (int r = 0; r < tokens * top_k; ++r) {
          if (local(r / top_k, r % top_k) != e) continue;
          route_row[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(row_token.size());
          row_token.push_back(r / top_k);
          factor.push_back(weights.as<float>()[r / top_k * stride + r % top_k]);
        }
        offsets.push_back(static_cast<std::int32_t>(row_token.size()));
      }
      const Memory<std::int32_t> got_offsets(offsets.size() + kernels::kTakenWords), got_token(row_token.size()),
          got_row(route_row.size()), token_offsets(2 + kernels::kTakenWords);
      const Memory<float> got_factor(row_token.size());
      const int chunks = (tokens * top_k + kernels::kSortChunk - 1) / kernels::kSortChunk;
      const Memory<std::int32_t> counts(static_cast<std::size_t>(chunks * experts));
      const kernels::SortArgs args{.routes = {.topk_ids = wide ? static_cast<const void*>(wide_ids.data()) : ids.data(),
                                              .ids_stride = stride,
                                              .ids_are_64 = wide,
                                              .tokens = tokens,
                                              .top_k = top_k,
                                              .expert_map = variant == 1 ? map.data() : nullptr,
                                              .id_limit = global,
                                              .topk_weights = weights.as<float>(),
                                              .weights_stride = stride,
                                              .weight_on_input = variant != 1},
                                   .experts = experts,
                                   .expert_offsets = got_offsets.data(),
                                   .row_token = got_token.data(),
                                   .route_row = got_row.data(),
                                   .row_factor = variant == 1 ? nullptr : got_factor.data(),
                                   .token_offsets = token_offsets.data(),
                                   .chunks = chunks,
                                   .chunk_counts = counts.data()};
      if (cluster) {
        run(
            2, kernels::kClusterSortThreads, [&] { sm90::sort_routes<2>(args); }, kernels::cluster_sort_bytes(experts),
            2);
      } else {
        if (chunks > 1) run(chunks, kernels::kSortThreads, [&] { kernels::count_routes(args); });
        run(chunks, kernels::kSortThreads, [&] { kernels::sort_routes(args); });
      }
      const auto equal = [](const auto& want, const auto& got) {
        return std::equal(want.begin(), want.end(), got.data());
      };
      ASSERT_TRUE(equal(offsets, got_offsets));
      ASSERT_TRUE(equal(row_token, got_token));
      ASSERT_TRUE(equal(route_row, got_row));
      ASSERT_TRUE(variant == 1 || equal(factor, got_factor));
      ASSERT_EQ(token_offsets[0], 0);
      ASSERT_EQ(token_offsets[1], tokens);
      for (std::size_t i = 0; i < kernels::kTakenWords; ++i) {
        ASSERT_EQ(got_offsets[offsets.size() + i], 0);
        ASSERT_EQ(token_offsets[2 + i], 0);
      }
    }
  }
}

// ---- the tile list that a GEMM begins with ----
// Rows counted by the kernel itself: ids of both widths, side by side or not, aligned or not, with a map, and what is
// no expert; then first tiles and rows.
TEST(TileList, CountsRoutes) {
  constexpr int kThreads = 512, kTokens = 48;
  std::mt19937 rng(9);
  for (const int experts : {1, 8, 513, 1024}) {
    for (const int routes : {1, 3, 6, 2049, 2 * 4096 - 2, 2 * 4096}) {
      for (int variant = 0; variant < 8; ++variant) {
        const bool wide = variant % 2 != 0, mapped = variant / 2 % 2 != 0, dense = variant < 4;
        const int top_k = routes % 2 == 0 ? 2 : 1, tokens = routes / top_k, stride = dense ? top_k : top_k + 1;
        // Dense ids begin 16 bytes into their memory, or, in every third case, one id further.
        const auto skip = static_cast<std::size_t>((wide ? 2 : 4) + (routes % 3 == 0 ? 1 : 0));
        const int global = mapped ? experts + 3 : experts;
        SCOPED_TRACE(std::to_string(experts) + " experts, " + std::to_string(routes) + " routes, variant " +
                     std::to_string(variant));
        const auto count = static_cast<std::size_t>(tokens * stride);
        const Memory<std::int64_t> wide_ids(count + skip);
        const Memory<std::int32_t> ids(count + skip);
        for (std::size_t i = 0; i < count; ++i) {
          std::int64_t id = static_cast<std::int64_t>(rng() % static_cast<unsigned>(global + 4)) - 2;
          ids[skip + i] = static_cast<std::int32_t>(id);
          if (i % 5 == 0) id += std::int64_t{1} << 32;  // an expert only if half of it is looked at
          wide_ids[skip + i] = id;
        }
        std::vector<std::int32_t> map(static_cast<std::size_t>(global));
        for (int e = 0; e < global; ++e) map[static_cast<std::size_t>(e)] = e % 3 == 0 ? -1 : e * 5 % experts;
        std::vector<std::int32_t> rows(static_cast<std::size_t>(experts), 0), tiles{0}, begin{0};
        for (int r = 0; r < routes; ++r) {
          const std::size_t at = skip + static_cast<std::size_t>(r / top_k * stride + r % top_k);
          const std::int64_t id = wide ? wide_ids[at] : ids[at];
          if (id < 0 || id >= global) continue;
          const int e = mapped ? map[static_cast<std::size_t>(id)] : static_cast<int>(id);
          if (e >= 0) ++rows[static_cast<std::size_t>(e)];
        }
        for (const int n : rows) {
          tiles.push_back(tiles.back() + (n + kTokens - 1) / kTokens);
          begin.push_back(begin.back() + n);
        }
        const kernels::Routes all{
            .topk_ids = wide ? static_cast<const void*>(wide_ids.data() + skip) : ids.data() + skip,
            .ids_stride = stride,
            .ids_are_64 = wide,
            .tokens = tokens,
            .top_k = top_k,
            .expert_map = mapped ? map.data() : nullptr,
            .id_limit = global,
            .topk_weights = nullptr,
            .weights_stride = 0,
            .weight_on_input = 0};
        kernels::GemmArgs args{};
        args.experts = experts;
        const Memory<std::int32_t> got_tiles(tiles.size()), got_begin(begin.size());
        run(1, kThreads, [&] {
          static __shared__ kernels::TileList list;
          kernels::build_tile_list<kTokens, kThreads>(list, args, &all);
          for (auto e = static_cast<std::size_t>(threadIdx.x); e < tiles.size(); e += kThreads) {
            got_tiles[e] = list.first_tile[e];
            got_begin[e] = list.row_begin[e];
          }
        });
        ASSERT_TRUE(std::equal(tiles.begin(), tiles.end(), got_tiles.data()));
        ASSERT_TRUE(std::equal(begin.begin(), begin.end(), got_begin.data()));
      }
    }
  }
}

// ---- combine ----
TEST(Combine, EqualsTheCpuEngine) {
  for (const DType type : kTypes) {
    for (int variant = 0; variant < 10; ++variant) {
      SCOPED_TRACE(std::to_string(static_cast<int>(type)) + ", variant " + std::to_string(variant));
      const bool shared = variant % 2 != 0, accumulate = variant / 2 % 2 != 0, aligned = variant < 4;
      const bool read_once = variant >= 8;
      const int tokens = 7, top_k = read_once ? 10 : 6, hidden = read_once ? 512 : 40, rows = tokens * top_k;
      const std::int64_t stride = aligned ? hidden : hidden + 5;
      std::mt19937 rng(static_cast<std::uint32_t>(variant));
      const Tensor y = random_tensor(DType::bfloat16, {rows, hidden}, 5),
                   shared_y = random_tensor(DType::bfloat16, {tokens, hidden}, 6);
      const Tensor weights = testing::random_topk_weights(tokens, top_k, 7),
                   gate = testing::random_topk_weights(tokens, 1, 8);
      std::vector<std::int32_t> route_row(static_cast<std::size_t>(rows));
      for (std::int32_t i = 0; i < rows; ++i) {  // of the first token all are skipped, of the second none
        const bool skipped = rng() % 4 == 0 && i / top_k != 1;
        route_row[static_cast<std::size_t>(i)] = skipped || i < top_k ? -1 : rows - 1 - i;
      }
      for (int row = 0; row < rows; ++row) y.as<std::uint16_t>()[row * hidden] = 0x8000;  // sums of -0 are -0
      const Tensor before = random_tensor(type, {tokens, stride}, 9), want = Tensor::copy_of(before);
      const auto bytes = static_cast<std::int64_t>(size_bytes(type));
      for (int t = 0; t < tokens; ++t) {
        std::vector<const void*> from;
        std::vector<float> weight;
        for (int j = 0; j < top_k; ++j) {
          const std::int32_t row = route_row[static_cast<std::size_t>(t * top_k + j)];
          if (row < 0) continue;
          from.push_back(y.as<std::uint16_t>() + row * hidden);
          weight.push_back(variant == 6 ? 1.0f : weights.as<float>()[t * top_k + j]);
        }
        if (shared) {
          from.push_back(shared_y.as<std::uint16_t>() + t * hidden);
          weight.push_back(gate.as<float>()[t]);
        }
        cpu::combine({.y = from.data(),
                      .weight = weight.data(),
                      .count = static_cast<int>(from.size()),
                      .n = hidden,
                      .out = want.as<char>() + t * stride * bytes,
                      .out_dtype = type,
                      .accumulate = accumulate});
      }
      // What is added to is added to once.
      const Tensor out = Tensor::copy_of(before);
      const Memory<std::uint16_t> once(read_once ? static_cast<std::size_t>(rows * hidden) : 0);
      if (read_once) std::memcpy(once.data(), y.view().data(), y.bytes());
      const kernels::CombineArgs args{.y = read_once ? once.data() : y.as<std::uint16_t>(),
                                      .route_row = route_row.data(),
                                      .topk_weights = variant == 6 ? nullptr : weights.as<float>(),
                                      .weights_stride = top_k,
                                      .shared_y = shared ? shared_y.as<std::uint16_t>() : nullptr,
                                      .shared_weight = gate.as<float>(),
                                      .out = out.as<char>(),
                                      .out_stride = stride,
                                      .out_type = type == DType::float32   ? OutType::f32
                                                  : type == DType::float16 ? OutType::fp16
                                                                           : OutType::bf16,
                                      .out_aligned = aligned,
                                      .accumulate = accumulate,
                                      .tokens = tokens,
                                      .top_k = top_k,
                                      .hidden = hidden,
                                      .read_once = read_once};
      launch({.grid = 2, .threads = kernels::kCombineThreads}, [&] { kernels::combine(args); });
      ASSERT_EQ(std::memcmp(out.as<char>(), want.as<char>(), want.bytes()), 0);
      for (int row = 0; read_once && row < rows; ++row) {  // those that have been read are dropped, and no other
        const bool read = std::find(route_row.begin(), route_row.end(), row) != route_row.end();
        const std::size_t bytes = static_cast<std::size_t>(hidden) * 2, at = static_cast<std::size_t>(row) * bytes;
        const int kept = std::memcmp(y.as<char>() + at, reinterpret_cast<const char*>(once.data()) + at, bytes);
        ASSERT_EQ(kept != 0, read) << "row " << row;
      }
    }
  }
}

TEST(SharedGate, EqualsTheCpuEngine) {
  for (const DType type : kTypes) {
    const int tokens = 5, hidden = 1040;
    const Tensor x = random_tensor(type, {tokens, hidden}, 1, 0.1f),
                 gate = random_tensor(DType::float32, {hidden}, 2, 0.01f);
    const Memory<float> weight(tokens);
    const kernels::SharedGateArgs args{.x = {x.view().data(), hidden, row_type(type), 1},
                                       .gate = gate.as<float>(),
                                       .weight = weight.data(),
                                       .tokens = tokens,
                                       .hidden = hidden};
    run(3, kernels::kSharedGateThreads, [&] { kernels::shared_gate(args); });
    for (int t = 0; t < tokens; ++t) {
      std::vector<float> row(hidden);
      cpu::to_float(x.as<char>() + t * hidden * static_cast<std::int64_t>(size_bytes(type)), type, hidden, row.data());
      ASSERT_EQ(num::bits(weight[static_cast<std::size_t>(t)]),
                num::bits(num::sigmoid(cpu::gate_dot(row.data(), gate.as<float>(), hidden))));
    }
  }
}

// ---- route ----
TEST(Route, EqualsTheHost) {
  const int tokens = 9, experts = 72;
  const Tensor bias = random_tensor(DType::float32, {experts}, 1, 0.05f);
  RouteOptions biased = RouteOptions::ernie45(bias), grouped = RouteOptions::deepseek_v3(bias);
  RouteOptions plain_groups;
  plain_groups.groups = 6;
  plain_groups.topk_groups = 2;
  for (const RouteOptions& o : {RouteOptions::qwen3(), biased, grouped, plain_groups}) {
    for (const DType type : kTypes) {
      for (const int top_k : {1, 8}) {
        const Tensor logits = random_tensor(type, {tokens, experts}, 2);
        // Ties, and a token that is poisoned.
        for (int i = 0; i < experts; ++i)
          reference::store(logits.as<char>() + (3 * experts + i) * static_cast<std::int64_t>(size_bytes(type)), type,
                           0.5f);
        reference::store(logits.as<char>() + (5 * experts + 7) * static_cast<std::int64_t>(size_bytes(type)), type,
                         num::nan());
        const Tensor weights = Tensor::zeros(DType::float32, {tokens, top_k}),
                     ids = Tensor::zeros(DType::int32, {tokens, top_k});
        route(logits, weights, ids, o);
        const Memory<float> got_weights(static_cast<std::size_t>(tokens * top_k));
        const Memory<std::int32_t> got_ids(static_cast<std::size_t>(tokens * top_k));
        const kernels::RouteArgs args{.logits = {logits.view().data(), experts, row_type(type), 0},
                                      .weights = got_weights.data(),
                                      .ids = got_ids.data(),
                                      .weights_stride = top_k,
                                      .ids_stride = top_k,
                                      .bias = o.correction_bias.as<float>(),
                                      .tokens = tokens,
                                      .experts = experts,
                                      .top_k = top_k,
                                      .groups = o.groups,
                                      .topk_groups = o.topk_groups,
                                      .scoring = static_cast<kernels::Scoring>(o.scoring),
                                      .renormalize = static_cast<kernels::Renormalize>(o.renormalize),
                                      .renormalize_min = o.renormalize_min,
                                      .scaling_factor = o.scaling_factor};
        run(
            2, kernels::kRouteThreads, [&] { kernels::route(args); },
            kernels::kRouteTokens * (2 * experts + 2 * o.groups) * 4);
        ASSERT_EQ(std::memcmp(got_ids.data(), ids.as<char>(), ids.bytes()), 0);
        ASSERT_EQ(std::memcmp(got_weights.data(), weights.as<char>(), weights.bytes()), 0);
      }
    }
  }
}

// ---- group_index, transpose_scales, gather_rows ----
TEST(GroupIndex, MakesOffsetsSafe) {
  std::mt19937 rng(3);
  for (const int experts : {1, 5, 256, 1024}) {
    for (const bool wide : {false, true}) {
      for (const bool masked : {false, true}) {
        const auto count = static_cast<std::size_t>(experts + (masked ? 0 : 1));
        std::vector<std::int64_t> index(count);
        for (std::int64_t& v : index) v = static_cast<std::int64_t>(rng() % 200) - 20;
        if (wide) index.back() = std::int64_t{1} << 40;
        const std::vector<std::int32_t> narrow(index.begin(), index.end());
        const auto end = static_cast<std::size_t>(experts + 1);
        const Memory<std::int32_t> offsets(end + kernels::kTakenWords);
        const kernels::GroupIndexArgs args{
            wide ? static_cast<const void*>(index.data()) : narrow.data(), wide, masked, experts, 150, offsets.data()};
        run(1, kernels::kGroupIndexThreads, [&] { kernels::group_index(args); });
        std::int64_t top = 0;
        for (std::size_t i = 0; i < count; ++i) {
          const std::int64_t v = std::clamp<std::int64_t>(wide ? index[i] : narrow[i], 0, 150);
          top = !masked && i == 0 ? 0 : std::max(masked ? 0 : top, v);
          ASSERT_EQ(offsets[i], top) << i;
        }
        for (std::size_t i = 0; i < kernels::kTakenWords; ++i) ASSERT_EQ(offsets[end + i], 0);
      }
    }
  }
}

TEST(TransposeScales, ColumnsFirst) {
  std::mt19937 rng(4);
  const std::size_t rows = 37, columns = 3, q_columns = 5;
  const auto scale = Memory<float>::of(rows * columns, [&] { return static_cast<float>(rng() % 1000); });
  const auto q = Memory<std::uint8_t>::of(rows * q_columns, [&] { return rng() % 256; });
  for (const bool broadcast : {false, true}) {
    const Memory<float> scale_out(rows * columns);
    const Memory<std::int32_t> q_out(rows * q_columns);
    const kernels::TransposeScalesArgs args{scale.data(), q.data(), scale_out.data(), q_out.data(),
                                            rows,         columns,  q_columns,        broadcast};
    run(2, kernels::kTransposeThreads, [&] { kernels::transpose_scales(args); });
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::size_t c = 0; c < columns; ++c) {
        ASSERT_EQ(scale_out[c * rows + r], broadcast ? scale[0] : scale[r * columns + c]);
      }
      for (std::size_t c = 0; c < q_columns; ++c) ASSERT_EQ(q_out[c * rows + r], q[r * q_columns + c]);
    }
  }
}

TEST(GatherRows, RowsAndTheirScales) {
  std::mt19937 rng(5);
  const std::size_t tokens = 11, rows = 29, k = 272, columns = 3, q_columns = 300;
  const auto q = Memory<std::int8_t>::of(tokens * k, [&] { return rng() % 256; });
  const auto scale = Memory<float>::of(tokens * columns, [&] { return static_cast<float>(rng() % 1000); });
  const auto block_q = Memory<std::int32_t>::of(tokens * q_columns, [&] { return rng() % 1000; }),
             zero = Memory<std::int32_t>::of(tokens, [&] { return rng() % 256; }),
             row_token = Memory<std::int32_t>::of(rows, [&] { return rng() % tokens; });
  const Memory<std::int8_t> q_out(rows * k);
  const Memory<float> scale_out(rows * columns);
  const Memory<std::int32_t> block_q_out(rows * q_columns), zero_out(rows);
  const std::int32_t count = rows - 2;
  const kernels::GatherRowsArgs args{q.data(),
                                     scale.data(),
                                     block_q.data(),
                                     zero.data(),
                                     row_token.data(),
                                     &count,
                                     q_out.data(),
                                     scale_out.data(),
                                     block_q_out.data(),
                                     zero_out.data(),
                                     tokens,
                                     rows,
                                     k,
                                     columns,
                                     q_columns};
  run(3, kernels::kGatherThreads, [&] { kernels::gather_rows(args); });
  for (std::size_t r = 0; r < rows; ++r) {
    const auto t = static_cast<std::size_t>(row_token[r]);
    const bool used = r + 2 < rows;
    for (std::size_t i = 0; i < k; ++i) ASSERT_EQ(q_out[r * k + i], used ? q[t * k + i] : 0);
    for (std::size_t c = 0; c < columns; ++c) ASSERT_EQ(scale_out[c * rows + r], used ? scale[c * tokens + t] : 0.0f);
    for (std::size_t c = 0; c < q_columns; ++c)
      ASSERT_EQ(block_q_out[c * rows + r], used ? block_q[c * tokens + t] : 0);
    ASSERT_EQ(zero_out[r], used ? zero[t] : 0);
  }
}

template <RowScheme S>
void add_quantizer_to(KernelTable& table, int scheme) {
  table[plan::quantize_id(scheme, plan::quantize_kernel(1024))] = [](const void* args) {
    kernels::quantize_rows<S, 32, 4>(*static_cast<const kernels::QuantizeArgs*>(args));
  };
}
template <class Args, void (*kKernel)(const Args&)>
void run_with(const void* args) {
  kKernel(*static_cast<const Args*>(args));
}

}  // namespace

const KernelTable& row_kernels() {
  static const KernelTable table = [] {
    KernelTable t = {
        {"activate", run_with<kernels::ActivateArgs, kernels::activate_rows>},
        {"combine", run_with<kernels::CombineArgs, kernels::combine>},
        {"count", run_with<kernels::SortArgs, kernels::count_routes>},
        {"gather_rows", run_with<kernels::GatherRowsArgs, kernels::gather_rows>},
        {"panels", run_with<kernels::PanelArgs, kernels::make_panels>},
        {"shared_gate", run_with<kernels::SharedGateArgs, kernels::shared_gate>},
        {"sm90_sort", run_with<kernels::SortArgs, sm90::sort_routes<2>>},  // the emulator's clusters have two CTAs
        {"sort", run_with<kernels::SortArgs, kernels::sort_routes>},
    };
    add_quantizer_to<RowScheme::channel>(t, 0);
    add_quantizer_to<RowScheme::static_scale>(t, 1);
    add_quantizer_to<RowScheme::asymmetric>(t, 2);
    add_quantizer_to<RowScheme::block>(t, 3);
    add_quantizer_to<RowScheme::hybrid>(t, 4);
    return t;
  }();
  return table;
}

}  // namespace octomoe::emulator
