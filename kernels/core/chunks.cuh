// int8_hybrid with float steps (Promotion::hybrid_flush): a tile's K-blocks are summed up in chunks.
#pragma once

#include "core/gemm_config.h"

namespace octomoe::kernels {

// Counts the K-blocks of a tile's chunks: they end with a super group, after flush_blocks, and with K.
struct ChunkCount {
  int32_t in_group = 0, in_chunk = 0;
  __device__ __forceinline__ bool ends(const GemmArgs& args, bool last) {
    ++in_group;
    ++in_chunk;
    return last || in_group == args.super_group || in_chunk == args.flush_blocks;
  }
  // Behind the end of one. Whether a super group ends with it.
  __device__ __forceinline__ bool next(const GemmArgs& args) {
    in_chunk = 0;
    const bool group_ends = in_group == args.super_group;
    if (group_ends) in_group = 0;
    return group_ends;
  }
};

}  // namespace octomoe::kernels
