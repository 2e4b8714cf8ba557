// Names of the catalogue's kernels: what an engine asks for and what a pack holds come from one place.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/gemm_config.h"
#include "jit/catalogue.h"

namespace octomoe::plan {

// How a row is quantised (kernels/quant/quantize_rows.cuh).
struct QuantizeKernel {
  int row_threads, passes;
};
QuantizeKernel quantize_kernel(std::int64_t k);  // for rows of k columns
inline constexpr const char* kRowSchemes[] = {"channel", "static_scale", "asymmetric", "block", "hybrid"};
std::string quantize_id(int row_scheme, QuantizeKernel kernel);
// In kernels' ids and tuned tables, by number.
inline constexpr const char* kPromotionNames[] = {"channel", "block", "hybrid", "hybrid_flush"};
inline constexpr const char* kEpilogueNames[] = {"store", "swiglu", "swiglu_block", "add"};

// The kernels for few tokens (kernels/core/few_args.h): by w13's promotion; by w2's and its kernels::few_column_lanes.
std::string few_gate_up_id(kernels::Promotion promotion);
std::string few_down_id(kernels::Promotion promotion, int column_lanes);

// Of the route kernel, for each of 4 tokens: E scores, E choices and up to E groups with two numbers each.
inline constexpr int kRouteSharedBytes = 4 * 4 * kernels::kMaxExperts * 4;

std::string gemm_id(const kernels::GemmConfig& config);
// Tiles of the SM80 family for one promotion and epilogue, by rising block_n. family: tile_family of the device.
std::span<const kernels::GemmConfig> gemm_configs(kernels::Promotion promotion, bool fine_groups,
                                                  kernels::Epilogue epilogue, int family);
// Kernels of the SM90 family: int8_channel's, and those with scale blocks of 128 or 256 columns.
std::string gemm_id(const kernels::WgmmaConfig& config);
std::string gemm_id(const kernels::TokenMajorConfig& config);
std::span<const kernels::WgmmaConfig> wgmma_configs();
std::span<const kernels::TokenMajorConfig> token_major_configs();
// 90, 80 or 89: which tiles a device's blocks have shared memory for.
int tile_family(int max_shared_bytes);

// The catalogue's entry; Error(internal) if there is none.
const KernelEntry& entry(const std::string& id);

}  // namespace octomoe::plan
