// kernels/sm90/grouped_gemm.cuh and token_major.cuh against docs/schemes.md section 3 as plain loops, bit for bit.
#include "cuda/tensor_map.h"
#include "emulator/kernel_table.h"
#include "emulator/problem.h"
#include "plan/catalogue.h"

namespace octomoe::emulator {
namespace {

using kernels::Epilogue;
using kernels::GemmArgs;
using kernels::OutType;
using kernels::Promotion;
using kernels::TokenMajorConfig;
using kernels::WgmmaArgs;
using kernels::WgmmaConfig;

// What a launch of a kernel needs beside the problem.
struct Shape {
  int ctas, threads, bytes, cluster, token_box;
  cuda::TensorBoxes weights;
};

void check_launch(GemmProblem& problem, const GemmCase& c, const Shape& how,
                  const std::function<void(const WgmmaArgs&)>& kernel) {
  // Where experts' rows are counted, the offsets are not looked at.
  std::vector<std::int64_t> ids;
  const bool early = !c.early_offsets.empty();
  for (std::size_t left = 1, i = 0; c.seed % 3 == 0 && !c.masked && !early && left > 0; ++i) {
    left = 0;
    for (std::size_t e = 0; e < c.rows.size(); ++e) {
      if (static_cast<std::size_t>(c.rows[e]) <= i) continue;
      ids.push_back(static_cast<std::int64_t>(e));
      ++left;
    }
  }
  kernels::Routes routes{};
  if (!ids.empty()) routes.topk_ids = ids.data();
  routes.ids_stride = routes.ids_are_64 = routes.top_k = 1;
  routes.tokens = static_cast<std::int32_t>(ids.size());
  routes.id_limit = static_cast<std::int32_t>(c.rows.size());
  problem.check([&](GemmArgs args, const Schedule& schedule) {
    if (!ids.empty()) args.expert_offsets = nullptr;
    const cuda::TensorBoxes rows = cuda::token_boxes(std::max<std::int64_t>(args.a_rows, 1), c.k, how.token_box);
    const WgmmaArgs all{.weights = encode_tensor_map(args.w, how.weights.sizes, how.weights.strides, how.weights.box),
                        .gemm = args,
                        .evict_first = c.seed % 2 == 0,
                        .weights_in_pairs = c.seed / 2 % 2 == 0,
                        .tokens_by_map = args.row_source == nullptr && args.a_rows > 0,
                        .offsets_late = c.seed % 3 == 0 || early,
                        .routes = routes,
                        .tokens = encode_tensor_map(args.a, rows.sizes, rows.strides, rows.box)};
    Launch launched{how.ctas * how.cluster, how.threads, how.bytes, how.cluster, schedule};
    const std::vector<std::int32_t> offsets(problem.offsets.data(), problem.offsets.data() + problem.offsets.size());
    if (early) {
      launched.predecessor = [&](bool waited) {
        const std::vector<std::int32_t>& now = waited ? offsets : c.early_offsets;
        std::copy(now.begin(), now.end(), problem.offsets.data());
      };
    }
    launch(launched, [&] { kernel(all); });
  });
}

// Stacks of weight rows, and how long these are, as the tensor map sees them.
std::int64_t stacks(const GemmCase& c) { return static_cast<std::int64_t>(c.rows.size()) * (c.panels ? c.k / 128 : 1); }
std::int64_t columns(const GemmCase& c) { return c.panels ? 128 : c.k; }

// One copy of each: other tests launch them too.
template <WgmmaConfig C>
[[gnu::noinline]] void kernel(const WgmmaArgs& all) {
  sm90::grouped_gemm<C>(all);
}
template <TokenMajorConfig C>
[[gnu::noinline]] void kernel(const WgmmaArgs& all) {
  sm90::token_major_gemm<C>(all);
}

template <WgmmaConfig C>
void check(GemmCase c, int ctas = 2) {
  c.promotion = Promotion::channel;
  c.gated = C.gated();
  if (C.gated()) c.segments = 2;
  GemmProblem problem(c);
  check_launch(problem, c,
               {ctas, C.threads(), C.pipeline_bytes(), C.cluster, WgmmaConfig::kTokenBox,
                cuda::weight_boxes(stacks(c), c.n, columns(c), c.gated)},
               kernel<C>);
}

template <TokenMajorConfig C>
void check(GemmCase c, int ctas = 2) {
  c.promotion = C.promotion;
  c.gated = C.gated();
  c.quantized = C.quantizes();
  if (C.gated()) c.segments = 2;
  c.block_k = 128 * C.block_stages;
  GemmProblem problem(c);
  check_launch(problem, c,
               {ctas, C.threads(), C.pipeline_bytes(), 1, TokenMajorConfig::kTokenBox,
                cuda::token_major_weight_boxes(stacks(c), c.n, columns(c), C.box_rows())},
               kernel<C>);
}

constexpr WgmmaConfig config(Epilogue epilogue, int block_n = 128, int cluster = 1) {
  return {epilogue, block_n, block_n == 160 ? 3 : 4, 5, cluster};
}
constexpr WgmmaConfig kStore = config(Epilogue::store);
constexpr WgmmaConfig kSwiglu = config(Epilogue::swiglu);
constexpr TokenMajorConfig blocks(Promotion promotion, Epilogue epilogue, int block_stages = 1) {
  const bool flush = promotion == Promotion::hybrid_flush;
  return {promotion, epilogue, flush ? 1 : 2, flush ? 6 : 4, block_stages};
}

// Widths of tiles: 16 to 128 in steps of 16, two tiles that share an expert's rows, one row, none.
TEST(Sm90Gemm, ChannelRaggedExperts) { check<kStore>({.rows = {5, 0, 37, 1, 0, 128, 150}, .n = 288, .k = 272}); }
// A caller's offsets that nobody has checked: below zero, beyond the rows, decreasing.
TEST(Sm90Gemm, WrongOffsetsStayInside) {
  check<kStore>({.rows = {9, 20, 3, 4}, .n = 256, .k = 128, .wrong_offsets = {7, -5, 1 << 30, 30, 1 << 30}, .seed = 2});
}
TEST(Sm90Gemm, ChannelWidthOfEveryTile) {
  check<kStore>({.rows = {16, 17, 33, 49, 65, 81, 97, 113}, .n = 32, .k = 128, .seed = 2}, 3);
}
// Offsets that the launch before may still write: as they were before, they say which weights come first. They are
// right, or another's (of another expert, of no tile, of tiles where there are none), or anything at all.
template <auto kConfig>
void check_early_offsets(GemmCase c) {
  const std::vector<std::vector<std::int32_t>> guesses = {
      {0, 30, 30, 170}, {0, 0, 170, 170}, {0, 0, 0, 0}, {-7, 1 << 30, 3, -(1 << 30)}, {0, 29, 31, 170}};
  for (const int k : {128, 272, 1296}) {
    for (const std::vector<std::int32_t>& guess : guesses) {
      c.k = k;
      c.early_offsets = guess;
      check<kConfig>(c, 3);
    }
  }
  c.rows = {0, 0, 0};  // none where some were expected
  c.early_offsets = guesses[0];
  check<kConfig>(c, 3);
}
TEST(Sm90Gemm, ChannelEarlyOffsets) {
  check_early_offsets<kStore>({.rows = {30, 0, 140}, .n = 288, .seed = 2});
  check_early_offsets<kSwiglu>({.rows = {30, 0, 140}, .n = 2 * 144, .gather = true, .seed = 3});
}

// One stage a tile: the producer is as many tiles ahead as it can be.
TEST(Sm90Gemm, ChannelManyShortTiles) {
  check<kStore>({.rows = {130, 7, 20, 0, 129, 3, 16, 31},
                 .n = 544,
                 .k = 112,
                 .gather = true,
                 .zero_points = true,
                 .row_factor = true,
                 .seed = 18},
                1);
}
// More routes than are counted side by side.
TEST(Sm90Gemm, ChannelManyRoutes) { check<kStore>({.rows = {4097, 0, 301}, .n = 32, .k = 16, .seed = 84}, 3); }
TEST(Sm90Gemm, ChannelLongK) { check<kStore>({.rows = {9, 20}, .n = 544, .k = 1296, .seed = 3}, 1); }
TEST(Sm90Gemm, ChannelMoreCtasThanTiles) { check<kStore>({.rows = {0, 3}, .n = 64, .k = 48, .seed = 4}, 5); }
TEST(Sm90Gemm, ChannelNoRows) { check<kStore>({.rows = {0, 0}, .n = 64, .k = 48, .seed = 5}); }
TEST(Sm90Gemm, ChannelEveryOption) {
  for (const OutType out : {OutType::bf16, OutType::fp16, OutType::f32}) {
    check<kStore>({.rows = {20, 3, 40},
                   .n = 288,
                   .k = 144,
                   .out = out,
                   .gather = true,
                   .zero_points = true,
                   .bias = true,
                   .row_factor = true,
                   .seed = 6 + static_cast<std::uint32_t>(out)});
  }
}
TEST(Sm90Gemm, ChannelScalePerExpertAndMaskedRows) {
  check<kStore>({.rows = {20, 0, 3, 40}, .n = 256, .k = 144, .masked = true, .per_tensor = true, .seed = 10});
  check<kStore>({.rows = {7, 70},
                 .n = 96,
                 .k = 64,
                 .out = OutType::f32,
                 .masked = true,
                 .zero_points = true,
                 .bias = true,
                 .seed = 11});
}
TEST(Sm90Gemm, Channel160) {
  check<config(Epilogue::store, 160)>({.rows = {150, 3, 200}, .n = 96, .k = 144, .seed = 12});
}
TEST(Sm90Gemm, ChannelSwiglu) {
  for (const bool up_first : {false, true}) {
    check<kSwiglu>({.rows = {5, 0, 37, 140}, .n = 2 * 144, .k = 272, .up_first = up_first, .seed = 13u + up_first});
    check<kSwiglu>({.rows = {20, 3},
                    .n = 2 * 160,
                    .k = 144,
                    .gather = true,
                    .zero_points = true,
                    .bias = true,
                    .row_factor = true,
                    .up_first = up_first,
                    .limit = 2.5f,
                    .seed = 15u + up_first});
  }
}

template <Promotion kPromotion, int kBlockStages>
void check_blocks() {
  constexpr TokenMajorConfig kPlain = blocks(kPromotion, Epilogue::store, kBlockStages);
  check<kPlain>({.rows = {5, 0, 37, 1, 140}, .n = 288, .k = 784, .seed = 20});
  check<kPlain>({.rows = {5, 30}, .n = 96, .k = 80, .seed = 21}, 1);  // less than a K-block
  check<kPlain>({.rows = {19, 2},
                 .n = 512,
                 .k = 400,
                 .segments = 2,
                 .out = OutType::f32,
                 .gather = true,
                 .bias = true,
                 .row_factor = true,
                 .seed = 22});
  check<kPlain>({.rows = {19, 0, 2}, .n = 256, .k = 256, .out = OutType::fp16, .masked = true, .seed = 23});
  check<kPlain>({.rows = {19, 0, 2}, .n = 256, .k = 400, .masked = true, .scales_by_row = true, .seed = 32});
  for (const bool gather : {false, true}) {
    check<kPlain>(
        {.rows = {3, 0, 70, 140}, .n = 288, .k = 784, .gather = gather, .scales_by_row = true, .seed = 30u + gather});
  }
  constexpr TokenMajorConfig kGated = blocks(kPromotion, Epilogue::swiglu, kBlockStages);
  for (const bool up_first : {false, true}) {
    check<kGated>({.rows = {5, 0, 61, 70}, .n = 2 * 160, .k = 528, .up_first = up_first, .seed = 24u + up_first});
    check<kGated>({.rows = {20, 3},
                   .n = 2 * 128,
                   .k = 272,
                   .block_n = 256,
                   .gather = true,
                   .bias = true,
                   .row_factor = true,
                   .up_first = up_first,
                   .limit = 2.5f,
                   .seed = 26u + up_first});
  }
}
TEST(Sm90Gemm, BlockEarlyOffsets) {
  check_early_offsets<blocks(Promotion::block, Epilogue::store)>({.rows = {30, 0, 140}, .n = 288, .seed = 2});
  check_early_offsets<blocks(Promotion::hybrid_flush, Epilogue::store, 2)>(
      {.rows = {30, 0, 140}, .n = 288, .flush_blocks = 2, .seed = 3});
}
TEST(Sm90Gemm, Block128) { check_blocks<Promotion::block, 1>(); }
TEST(Sm90Gemm, Block256) { check_blocks<Promotion::block, 2>(); }
// Tiles of one consumer and of both, full and not; an expert's rows shared out over two tiles.
TEST(Sm90Gemm, BlockRowsOfEveryTile) {
  check<blocks(Promotion::block, Epilogue::store)>(
      {.rows = {1, 63, 64, 65, 128, 129, 192, 0, 193}, .n = 288, .k = 128, .seed = 70}, 3);
  check<blocks(Promotion::hybrid, Epilogue::store)>(
      {.rows = {1, 63, 64, 65, 128, 129, 192, 0, 193}, .n = 544, .k = 272, .gather = true, .seed = 71}, 1);
}
// SwiGLU and requantising: output columns that end inside a tile (in either consumer's part, or with the first one's),
// many tiles one after another in a CTA, values that are not finite.
TEST(Sm90Gemm, BlockSwigluQuantized) {
  constexpr TokenMajorConfig kQuantized = blocks(Promotion::block, Epilogue::swiglu_block);
  for (const bool up_first : {false, true}) {
    check<kQuantized>({.rows = {5, 0, 61, 70}, .n = 2 * 160, .k = 528, .up_first = up_first, .seed = 60u + up_first});
    check<kQuantized>({.rows = {20, 3, 150},
                       .n = 2 * 224,
                       .k = 272,
                       .block_n = 256,
                       .gather = true,
                       .bias = true,
                       .row_factor = true,
                       .up_first = up_first,
                       .limit = 2.5f,
                       .seed = 62u + up_first});
  }
  check<kQuantized>({.rows = {130, 7, 20, 0, 129, 3, 16, 31}, .n = 2 * 288, .k = 112, .seed = 64}, 1);
  check<kQuantized>({.rows = {37, 128}, .n = 2 * 64, .k = 128, .seed = 65});
  check<kQuantized>({.rows = {19, 0, 2}, .n = 2 * 256, .k = 256, .masked = true, .seed = 66});
  check<kQuantized>({.rows = {100, 28}, .n = 2 * 256, .k = 256, .extreme = true, .seed = 67});
}
TEST(Sm90Gemm, HybridManyShortTiles) {
  check<blocks(Promotion::hybrid, Epilogue::store)>(
      {.rows = {130, 7, 20, 0, 129, 3, 16, 31}, .n = 544, .k = 112, .row_factor = true, .seed = 28}, 1);
}
TEST(Sm90Gemm, Hybrid128) { check_blocks<Promotion::hybrid, 1>(); }
TEST(Sm90Gemm, Hybrid256) { check_blocks<Promotion::hybrid, 2>(); }

// Chunks that end with a super group, with flush_blocks, with K.
template <int kBlockStages>
void check_flush() {
  constexpr TokenMajorConfig kPlain = blocks(Promotion::hybrid_flush, Epilogue::store, kBlockStages);
  constexpr TokenMajorConfig kGated = blocks(Promotion::hybrid_flush, Epilogue::swiglu, kBlockStages);
  check<kPlain>({.rows = {5, 0, 37, 1, 140}, .n = 288, .k = 1168, .super_group = 4, .flush_blocks = 3, .seed = 40});
  check<kPlain>({.rows = {19, 2},
                 .n = 512,
                 .k = 784,
                 .segments = 2,
                 .super_group = 3,
                 .flush_blocks = 2,
                 .out = OutType::f32,
                 .gather = true,
                 .bias = true,
                 .row_factor = true,
                 .seed = 41});
  check<kPlain>({.rows = {30, 300}, .n = 96, .k = 656, .super_group = 256, .flush_blocks = 1, .seed = 42});
  check<kPlain>({.rows = {3, 0, 70, 140},
                 .n = 288,
                 .k = 1168,
                 .super_group = 4,
                 .flush_blocks = 3,
                 .gather = true,
                 .scales_by_row = true,
                 .seed = 44});
  // Many tiles of a chunk or a few, so that a chunk's place is used again while others are under way.
  check<kPlain>({.rows = {130, 7, 20, 0, 129, 3, 16, 31}, .n = 544, .k = 112, .row_factor = true, .seed = 48}, 1);
  check<kPlain>({.rows = {1, 63, 64, 65, 128, 129, 192, 0, 193},
                 .n = 288,
                 .k = 528,
                 .flush_blocks = 2,
                 .gather = true,
                 .seed = 71},
                2);
  for (const bool up_first : {false, true}) {
    check<kGated>({.rows = {5, 0, 61, 70},
                   .n = 2 * 160,
                   .k = 784,
                   .super_group = 2,
                   .flush_blocks = 2,
                   .up_first = up_first,
                   .seed = 43u + up_first});
  }
}
TEST(Sm90Gemm, HybridFlush128) { check_flush<1>(); }
TEST(Sm90Gemm, HybridFlush256) { check_flush<2>(); }

// Pairs of CTAs that share the weights: both work, one has no rows, uneven numbers of tiles.
TEST(Sm90Gemm, ClustersOfTwo) {
  check<config(Epilogue::store, 128, 2)>({.rows = {5, 0, 37, 1, 300}, .n = 288, .k = 784, .seed = 30});
  check<config(Epilogue::swiglu, 128, 2)>(
      {.rows = {130, 2}, .n = 2 * 144, .k = 272, .gather = true, .zero_points = true, .bias = true, .seed = 31});
  check<config(Epilogue::store, 160, 2)>({.rows = {5, 0, 37, 400}, .n = 544, .k = 144, .seed = 33}, 1);
}

// Rows that are added up in out: to rows of their own and of others, times a weight or not, from tiles of one stage on.
template <auto kConfig>
void check_adds(std::uint32_t seed) {
  for (const OutType out : {OutType::bf16, OutType::fp16}) {
    for (const int k : {48, 128, 272}) {
      check<kConfig>({.rows = {5, 0, 37, 1, 150}, .n = 288, .k = k, .out = out, .adds = true, .seed = seed++}, 2);
    }
  }
  check<kConfig>({.rows = {130, 7, 20, 0, 129, 3, 16, 31}, .n = 544, .k = 112, .adds = true, .seed = seed}, 1);
  for (const int k : {128, 256}) {  // of one panel, a second stage is another expert's, times zero
    check<kConfig>({.rows = {70, 3}, .n = 96, .k = k, .panels = true, .adds = true, .seed = ++seed}, 3);
  }
  check<kConfig>({.rows = {0, 0}, .n = 64, .k = 48, .adds = true, .seed = seed + 1});
}
TEST(Sm90Gemm, ChannelAdds) {
  check_adds<config(Epilogue::add)>(200);
  check_adds<config(Epilogue::add, 160)>(220);
  check_adds<config(Epilogue::add, 160, 2)>(240);
}
TEST(Sm90Gemm, BlockAdds) {
  check_adds<blocks(Promotion::block, Epilogue::add)>(260);
  check_adds<blocks(Promotion::block, Epilogue::add, 2)>(280);
}
TEST(Sm90Gemm, HybridAdds) {
  check_adds<blocks(Promotion::hybrid, Epilogue::add)>(300);
  check_adds<blocks(Promotion::hybrid, Epilogue::add, 2)>(320);
  check_adds<blocks(Promotion::hybrid_flush, Epilogue::add)>(340);
  check_adds<blocks(Promotion::hybrid_flush, Epilogue::add, 2)>(360);
}

// Panels of weights: one, two, and as many as stages and more; columns that end inside a tile.
TEST(Sm90Gemm, Panels) {
  for (const int k : {128, 256, 768}) {
    const auto seed = static_cast<std::uint32_t>(80 + k / 128);
    check<kStore>({.rows = {5, 0, 37, 1, 150}, .n = 288, .k = k, .panels = true, .seed = seed});
    check<kSwiglu>({.rows = {5, 0, 140}, .n = 2 * 144, .k = k, .gather = true, .panels = true, .seed = seed});
    check<config(Epilogue::store, 160, 2)>({.rows = {5, 300}, .n = 544, .k = k, .panels = true, .seed = seed}, 1);
    check<blocks(Promotion::hybrid, Epilogue::store)>(
        {.rows = {5, 0, 140}, .n = 288, .k = k, .panels = true, .seed = seed});
    check<blocks(Promotion::block, Epilogue::swiglu_block)>(
        {.rows = {70, 3}, .n = 2 * 160, .k = k, .gather = true, .up_first = true, .panels = true, .seed = seed});
    check<blocks(Promotion::block, Epilogue::swiglu, 2)>(
        {.rows = {70, 3}, .n = 2 * 160, .k = k, .panels = true, .seed = seed});
    check<blocks(Promotion::hybrid_flush, Epilogue::store)>(
        {.rows = {5, 0, 37}, .n = 288, .k = k, .flush_blocks = 2, .panels = true, .seed = seed});
  }
}

template <auto C>
void add_to(KernelTable& table) {
  table[plan::gemm_id(C)] = [](const void* args) { kernel<C>(*static_cast<const WgmmaArgs*>(args)); };
}

template <Promotion kPromotion>
void add_blocks_to(KernelTable& table) {
  add_to<blocks(kPromotion, Epilogue::store)>(table);
  add_to<blocks(kPromotion, Epilogue::store, 2)>(table);
  add_to<blocks(kPromotion, Epilogue::swiglu)>(table);
  add_to<blocks(kPromotion, Epilogue::swiglu, 2)>(table);
  add_to<blocks(kPromotion, Epilogue::add)>(table);
  add_to<blocks(kPromotion, Epilogue::add, 2)>(table);
}

}  // namespace

const KernelTable& sm90_gemms() {
  static const KernelTable table = [] {
    KernelTable t;
    add_to<kStore>(t);
    add_to<kSwiglu>(t);
    add_to<config(Epilogue::add)>(t);
    add_to<config(Epilogue::store, 160)>(t);
    add_to<config(Epilogue::add, 160)>(t);
    add_to<config(Epilogue::store, 160, 2)>(t);
    add_to<config(Epilogue::add, 160, 2)>(t);
    add_to<blocks(Promotion::block, Epilogue::swiglu_block)>(t);
    add_blocks_to<Promotion::block>(t);
    add_blocks_to<Promotion::hybrid>(t);
    add_blocks_to<Promotion::hybrid_flush>(t);
    return t;
  }();
  return table;
}

}  // namespace octomoe::emulator
