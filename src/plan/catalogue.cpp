// The catalogue: one line per kernel, and the tiles of the GEMM families.
#include "plan/catalogue.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "core/few_args.h"
#include "tensor/check.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::GemmConfig;
using kernels::Order;
using kernels::Promotion;
using kernels::TokenMajorConfig;
using kernels::WgmmaConfig;

struct Tile {
  int m, n, k, stages, warps_m, warps_n, min_blocks;
  Order order;
};
constexpr Order kSteps = Order::steps, kTiles = Order::tiles;

// docs/kernels.md says what was measured. Blocks may take 227 KB of shared memory on SM90, 163 on SM80, 99 on SM86 and
// SM89, 1 KB less than what a multiprocessor has.
constexpr Tile kChannel90[] = {
    {128, 8, 128, 5, 4, 1, 2, kSteps},
    {128, 64, 128, 4, 2, 2, 2, kSteps},
    {256, 96, 128, 4, 4, 2, 1, kSteps},
    {256, 128, 128, 4, 4, 2, 1, kSteps},
};
constexpr Tile kChannel80[] = {
    {128, 8, 128, 4, 4, 1, 2, kSteps},  {128, 16, 128, 3, 4, 1, 2, kSteps}, {128, 32, 128, 3, 4, 1, 2, kSteps},
    {256, 64, 128, 3, 4, 2, 1, kSteps}, {256, 96, 128, 3, 4, 2, 1, kSteps},
};
constexpr Tile kChannel89[] = {
    {128, 8, 128, 4, 4, 1, 1, kSteps},  {128, 16, 128, 4, 4, 1, 1, kSteps}, {128, 32, 128, 4, 4, 1, 1, kSteps},
    {128, 64, 128, 3, 2, 2, 1, kSteps}, {128, 96, 128, 3, 4, 2, 1, kSteps},
};
constexpr Tile kBlock90[] = {
    {128, 8, 128, 5, 4, 1, 2, kTiles},
    {128, 128, 128, 6, 4, 2, 1, kTiles},
};
constexpr Tile kHybrid90[] = {
    {128, 8, 128, 5, 4, 1, 2, kTiles},
    {128, 128, 128, 6, 2, 4, 1, kTiles},
    {128, 160, 128, 5, 2, 4, 1, kTiles},
};
constexpr Tile kBlock80[] = {
    {128, 8, 128, 4, 4, 1, 2, kTiles},
    {128, 16, 128, 3, 4, 1, 2, kTiles},
    {128, 32, 128, 3, 4, 1, 2, kTiles},
    {128, 96, 128, 5, 4, 2, 1, kTiles},
};
constexpr Tile kBlock89[] = {
    {128, 8, 128, 4, 4, 1, 1, kTiles},
    {128, 16, 128, 4, 4, 1, 1, kTiles},
    {128, 32, 128, 4, 4, 1, 1, kTiles},
    {128, 80, 128, 3, 4, 2, 1, kTiles},
};
// Scale blocks other than 128 columns: right everywhere, tuned for nothing.
constexpr Tile kGeneral[] = {{128, 32, 128, 4, 4, 1, 1, kSteps}};
// Sums with float steps: three sets of them.
constexpr Tile kFlush90[] = {{128, 64, 128, 6, 4, 2, 1, kTiles}, {128, 96, 128, 6, 4, 2, 1, kTiles}};
constexpr Tile kFlush80[] = {{128, 64, 128, 5, 4, 2, 1, kTiles}};
constexpr Tile kFlush89[] = {{128, 64, 128, 3, 4, 2, 1, kTiles}};

constexpr int kFamilies[] = {80, 89, 90};  // one set of tiles each

std::vector<GemmConfig> make_configs(std::span<const Tile> tiles, Promotion promotion, bool fine, Epilogue epilogue) {
  std::vector<GemmConfig> configs;
  for (const Tile& t : tiles) {
    configs.push_back(
        {promotion, epilogue, t.m, t.n, t.k, t.stages, t.warps_m, t.warps_n, fine, t.min_blocks, t.order});
  }
  return configs;
}

std::span<const Tile> tiles_of(Promotion promotion, bool fine, int family) {
  const auto of = [family](std::span<const Tile> t80, std::span<const Tile> t89, std::span<const Tile> t90) {
    return family == 90 ? t90 : family == 80 ? t80 : t89;
  };
  if (fine) return kGeneral;
  if (promotion == Promotion::channel) return of(kChannel80, kChannel89, kChannel90);
  if (promotion == Promotion::hybrid_flush) return of(kFlush80, kFlush89, kFlush90);
  return of(kBlock80, kBlock89, promotion == Promotion::hybrid ? std::span<const Tile>(kHybrid90) : kBlock90);
}

KernelEntry gemm_entry(const GemmConfig& c, std::vector<int> archs) {
  KernelEntry e;
  e.id = gemm_id(c);
  e.header = "sm80/grouped_gemm.cuh";
  e.call = fmt::format(
      "octomoe::sm80::grouped_gemm<octomoe::kernels::GemmConfig{{octomoe::kernels::Promotion::{}, "
      "octomoe::kernels::Epilogue::{}, {}, {}, {}, {}, {}, {}, {}, {}, octomoe::kernels::Order::{}}}>",
      kPromotionNames[static_cast<int>(c.promotion)], kEpilogueNames[static_cast<int>(c.epilogue)], c.block_m,
      c.block_n, c.block_k, c.stages, c.warps_m, c.warps_n, c.fine_groups, c.min_blocks,
      c.order == Order::steps ? "steps" : "tiles");
  e.args_type = "octomoe::kernels::GemmArgs";
  e.threads = c.threads();
  e.min_blocks = c.min_blocks;
  e.shared_bytes = c.pipeline_bytes();
  e.archs = std::move(archs);
  e.expect = "IMMA";
  return e;
}

// The SM90 family's kernels: int8_channel (sm90/grouped_gemm.cuh), ...
constexpr WgmmaConfig kWgmma[] = {
    {Epilogue::store, 128, 4, 5, 1},  {Epilogue::swiglu, 128, 4, 5, 1}, {Epilogue::store, 160, 3, 5, 1},
    {Epilogue::swiglu, 160, 3, 5, 1}, {Epilogue::store, 160, 3, 5, 2},  {Epilogue::add, 128, 4, 5, 1},
    {Epilogue::add, 160, 3, 5, 1},    {Epilogue::add, 160, 3, 5, 2},
};
// ... and sums per K-block (sm90/token_major.cuh). Three sets of sums leave registers for half as many weight rows.
constexpr TokenMajorConfig kTokenMajor[] = {
    {Promotion::block, Epilogue::store, 2, 4, 1},         {Promotion::block, Epilogue::swiglu, 2, 4, 1},
    {Promotion::block, Epilogue::swiglu_block, 2, 4, 1},  {Promotion::block, Epilogue::store, 2, 4, 2},
    {Promotion::block, Epilogue::swiglu, 2, 4, 2},        {Promotion::hybrid, Epilogue::store, 2, 4, 1},
    {Promotion::hybrid, Epilogue::swiglu, 2, 4, 1},       {Promotion::hybrid, Epilogue::store, 2, 4, 2},
    {Promotion::hybrid, Epilogue::swiglu, 2, 4, 2},       {Promotion::hybrid_flush, Epilogue::store, 1, 6, 1},
    {Promotion::hybrid_flush, Epilogue::swiglu, 1, 6, 1}, {Promotion::hybrid_flush, Epilogue::store, 1, 6, 2},
    {Promotion::hybrid_flush, Epilogue::swiglu, 1, 6, 2}, {Promotion::block, Epilogue::add, 2, 4, 1},
    {Promotion::block, Epilogue::add, 2, 4, 2},           {Promotion::hybrid, Epilogue::add, 2, 4, 1},
    {Promotion::hybrid, Epilogue::add, 2, 4, 2},          {Promotion::hybrid_flush, Epilogue::add, 1, 6, 1},
    {Promotion::hybrid_flush, Epilogue::add, 1, 6, 2},
};

template <class Config>
KernelEntry wgmma_entry(const Config& c, const char* header) {
  KernelEntry e;
  e.id = gemm_id(c);
  e.header = header;
  e.args_type = "octomoe::kernels::WgmmaArgs";
  e.threads = c.threads();
  e.shared_bytes = c.pipeline_bytes();
  e.archs = {90};
  e.expect = "IGMMA";
  return e;
}
KernelEntry gemm_entry(const WgmmaConfig& c) {
  KernelEntry e = wgmma_entry(c, "sm90/grouped_gemm.cuh");
  e.call = fmt::format(
      "octomoe::sm90::grouped_gemm<octomoe::kernels::WgmmaConfig{{octomoe::kernels::Epilogue::{}, {}, {}, {}, {}}}>",
      kEpilogueNames[static_cast<int>(c.epilogue)], c.block_n, c.weight_stages, c.token_stages, c.cluster);
  e.cluster = c.cluster > 1;
  return e;
}
KernelEntry gemm_entry(const TokenMajorConfig& c) {
  KernelEntry e = wgmma_entry(c, "sm90/token_major.cuh");
  e.call = fmt::format(
      "octomoe::sm90::token_major_gemm<octomoe::kernels::TokenMajorConfig{{octomoe::kernels::Promotion::{}, "
      "octomoe::kernels::Epilogue::{}, {}, {}, {}}}>",
      kPromotionNames[static_cast<int>(c.promotion)], kEpilogueNames[static_cast<int>(c.epilogue)], c.parts, c.stages,
      c.block_stages);
  return e;
}

const char* few_name(Promotion p) {
  return kPromotionNames[static_cast<int>(p == Promotion::hybrid_flush ? Promotion::hybrid : p)];  // one serves both
}

KernelEntry simple_entry(std::string id, std::string header, const std::string& call, const std::string& args,
                         int threads, int shared_bytes = 0) {
  KernelEntry e;
  e.id = std::move(id);
  e.header = std::move(header);
  e.call = "octomoe::kernels::" + call;
  e.args_type = "octomoe::kernels::" + args;
  e.threads = threads;
  e.shared_bytes = shared_bytes;
  e.archs = {80, 86, 89, 90};
  return e;
}

constexpr QuantizeKernel kQuantizeKernels[] = {{32, 4}, {256, 1}, {256, 4}, {256, 0}};

std::vector<KernelEntry> make_catalogue() {
  std::vector<KernelEntry> all;
  for (int s = 0; s < 5; ++s) {
    for (const QuantizeKernel& q : kQuantizeKernels) {
      all.push_back(simple_entry(quantize_id(s, q), "quant/quantize_rows.cuh",
                                 fmt::format("quantize_rows<octomoe::kernels::RowScheme::{}, {}, {}>", kRowSchemes[s],
                                             q.row_threads, q.passes),
                                 "QuantizeArgs", 256));
    }
  }
  all.push_back(simple_entry("panels", "quant/panels.cuh", "make_panels", "PanelArgs", 256));
  all.push_back(simple_entry("activate", "quant/activate_rows.cuh", "activate_rows", "ActivateArgs", 256));
  all.push_back(simple_entry("count", "route/sort.cuh", "count_routes", "SortArgs", kernels::kSortThreads));
  all.push_back(simple_entry("sort", "route/sort.cuh", "sort_routes", "SortArgs", kernels::kSortThreads));
  all.push_back(simple_entry("combine", "route/combine.cuh", "combine", "CombineArgs", 256));
  all.push_back(simple_entry("shared_gate", "route/shared_gate.cuh", "shared_gate", "SharedGateArgs", 256));
  all.push_back(simple_entry("group_index", "route/group_index.cuh", "group_index", "GroupIndexArgs", 1024));
  all.push_back(
      simple_entry("transpose_scales", "route/group_index.cuh", "transpose_scales", "TransposeScalesArgs", 256));
  all.push_back(simple_entry("gather_rows", "route/group_index.cuh", "gather_rows", "GatherRowsArgs", 256));
  all.push_back(simple_entry("route", "route/route.cuh", "route", "RouteArgs", 128, kRouteSharedBytes));
  all.push_back(simple_entry("bench:read", "bench/ceilings.cuh", "read_ceiling", "CeilingArgs", 512));
  all.push_back(simple_entry("bench:multiply", "bench/ceilings.cuh", "multiply_ceiling", "CeilingArgs", 512));
  all.back().expect = "IMMA";
  all.push_back(simple_entry("bench:clock", "bench/ceilings.cuh", "clock_probe", "CeilingArgs", 32));
  for (const Promotion p : {Promotion::channel, Promotion::block, Promotion::hybrid, Promotion::hybrid_flush}) {
    for (const bool fine : {false, true}) {
      if (fine && p == Promotion::channel) continue;
      for (const Epilogue e : {Epilogue::store, Epilogue::swiglu}) {
        for (const int family : kFamilies) {
          for (const GemmConfig& c : gemm_configs(p, fine, e, family)) {
            const std::vector<int> archs = family == 89 ? std::vector<int>{86, 89} : std::vector<int>{family};
            const auto same = std::ranges::find(all, gemm_id(c), &KernelEntry::id);
            if (same == all.end()) {
              all.push_back(gemm_entry(c, archs));
            } else {
              same->archs.insert(same->archs.end(), archs.begin(), archs.end());
            }
          }
        }
      }
    }
  }
  for (const WgmmaConfig& c : kWgmma) all.push_back(gemm_entry(c));
  for (const TokenMajorConfig& c : kTokenMajor) all.push_back(gemm_entry(c));
  KernelEntry sort = simple_entry("sm90_sort", "sm90/sort.cuh", "", "SortArgs", kernels::kClusterSortThreads,
                                  kernels::cluster_sort_bytes(kernels::kMaxExperts));
  sort.call = fmt::format("octomoe::sm90::sort_routes<{}>", kernels::kSortCluster);
  sort.archs = {90};
  sort.cluster = true;
  all.push_back(std::move(sort));
  const auto few = [&](KernelEntry e, std::string call, int registers) {
    e.call = std::move(call);
    e.max_registers = registers;
    e.archs = {90};
    e.expect = "IDP.4A";
    all.push_back(std::move(e));
  };
  for (const Promotion p : {Promotion::channel, Promotion::block, Promotion::hybrid}) {
    few(simple_entry(few_gate_up_id(p), "sm90/few_gate_up.cuh", "", "FewGateUpArgs", kernels::kFewGateUpThreads,
                     kernels::kFewGateUpSharedBytes),
        fmt::format("octomoe::sm90::few_gate_up<octomoe::kernels::Promotion::{}>", few_name(p)),
        kernels::kFewGateUpRegisters);
    for (const int lanes : {8, 4}) {
      if (p == Promotion::channel && lanes == 4) continue;
      few(simple_entry(few_down_id(p, lanes), "sm90/few_down.cuh", "", "FewDownArgs", kernels::kFewDownThreads,
                       220 * 1024),
          fmt::format("octomoe::sm90::few_down<octomoe::kernels::Promotion::{}, {}>", few_name(p), lanes),
          kernels::kFewDownRegisters);
    }
  }
  return all;
}

}  // namespace

QuantizeKernel quantize_kernel(std::int64_t k) {
  for (const QuantizeKernel& q : kQuantizeKernels) {
    if (k <= q.row_threads * 8 * q.passes) return q;
  }
  return kQuantizeKernels[std::size(kQuantizeKernels) - 1];
}

std::string quantize_id(int row_scheme, QuantizeKernel kernel) {
  return fmt::format("quantize:{}:t{}p{}", kRowSchemes[row_scheme], kernel.row_threads, kernel.passes);
}

std::string few_gate_up_id(Promotion promotion) { return fmt::format("sm90_few:gate_up:{}", few_name(promotion)); }
std::string few_down_id(Promotion promotion, int column_lanes) {
  return fmt::format("sm90_few:down:{}:l{}", few_name(promotion), column_lanes);
}

std::string gemm_id(const GemmConfig& c) {
  return fmt::format("sm80_gemm:{}{}:{}:m{}n{}k{}s{}w{}x{}o{}", kPromotionNames[static_cast<int>(c.promotion)],
                     c.fine_groups ? "_fine" : "", kEpilogueNames[static_cast<int>(c.epilogue)], c.block_m, c.block_n,
                     c.block_k, c.stages, c.warps_m, c.warps_n, c.min_blocks);
}

std::string gemm_id(const WgmmaConfig& c) {
  return fmt::format("sm90_gemm:channel:{}:m{}n{}w{}t{}c{}", kEpilogueNames[static_cast<int>(c.epilogue)], c.block_m(),
                     c.block_n, c.weight_stages, c.token_stages, c.cluster);
}

std::string gemm_id(const TokenMajorConfig& c) {
  return fmt::format("sm90_gemm:{}{}:{}:m{}n{}s{}", kPromotionNames[static_cast<int>(c.promotion)],
                     c.block_stages * TokenMajorConfig::kBlockK, kEpilogueNames[static_cast<int>(c.epilogue)],
                     c.block_m(), TokenMajorConfig::kBlockN, c.stages);
}

std::span<const WgmmaConfig> wgmma_configs() { return kWgmma; }
std::span<const TokenMajorConfig> token_major_configs() { return kTokenMajor; }

int tile_family(int max_shared_bytes) {
  return max_shared_bytes >= 220 * 1024 ? 90 : max_shared_bytes >= 160 * 1024 ? 80 : 89;
}

std::span<const GemmConfig> gemm_configs(Promotion promotion, bool fine, Epilogue epilogue, int family) {
  static const auto* all = [] {
    auto* map = new std::map<std::array<int, 4>, std::vector<GemmConfig>>;
    for (int p = 0; p < 4; ++p) {
      for (int f = 0; f < 2; ++f) {
        for (int e = 0; e < 2; ++e) {
          for (const int family : kFamilies) {
            const auto kind = static_cast<Promotion>(p);
            (*map)[{p, f, e, family}] =
                make_configs(tiles_of(kind, f != 0, family), kind, f != 0, static_cast<Epilogue>(e));
          }
        }
      }
    }
    return map;
  }();
  const auto found = all->find({static_cast<int>(promotion), fine, static_cast<int>(epilogue), family});
  return found == all->end() ? std::span<const GemmConfig>{} : found->second;
}

const KernelEntry& entry(const std::string& id) {
  const KernelEntry* e = find_kernel(id);
  if (e == nullptr) fail(ErrorCode::internal, "the catalogue has no kernel {}", id);
  return *e;
}

}  // namespace octomoe::plan

namespace octomoe {

const std::vector<KernelEntry>& catalogue() {
  static const std::vector<KernelEntry> entries = plan::make_catalogue();
  return entries;
}

}  // namespace octomoe
