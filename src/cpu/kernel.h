// The inner products: rows of one expert times one unit of packed weights (two panels of 16 columns), for every
// instruction set. Everything else (gathering, epilogues, scheduling) is shared code around them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace octomoe::cpu {

inline constexpr int kPanel = 16;         // columns of a panel: one AMX tile, one AVX-512 or two AVX2 vectors
inline constexpr int kUnit = 2 * kPanel;  // gate and up of the same 16 columns, or 32 neighbours

// How a row of activations lies in the kernel's scratch, and with it how weights are packed.
enum class RowFormat : std::uint8_t {
  int16,    // AVX2, portable: vpmaddwd is exact on int16, vpmaddubsw saturates. Panels [K/2][16][2]
  int8,     // VNNI, AMX. Panels [K/4][16][4]
  float32,  // float schemes. Panels: bf16 and fp16 [K][16], int4 [K/8][16] dwords of eight nibbles
  bf16,     // AMX. Panels [K/2][16][2]
};

enum class Promote : std::uint8_t {
  none,    // int8_channel: c is int32, the sum over all of K
  block,   // int8_block: float32, one fma per K-block
  hybrid,  // int8_hybrid: integer scales, one fma per chunk
};

struct IntUnit {
  // Rows: `rows` of them, a_stride bytes apart; K-block b starts a_block_stride elements after block b - 1.
  const void* a = nullptr;
  std::int64_t a_stride = 0, a_block_stride = 0;
  int rows = 0;
  // Weights: panel p at w + p * panel_bytes.
  const std::int8_t* w = nullptr;
  std::int64_t panel_bytes = 0;
  std::int64_t k = 0, block_k = 0;  // block_k = k where the scheme has no blocks
  Promote promote = Promote::none;
  // Scales. Activations: sa [rows][sa_stride] per K-block (block) or super group (hybrid); qa [rows][blocks].
  // Weights: sw [2 panels][blocks or super groups][width], qw [2][blocks][width]; width 1 (a scale for all 16 columns)
  // or 16.
  const float* sa = nullptr;
  const std::int32_t* qa = nullptr;
  const float* sw = nullptr;
  const std::uint8_t* qw = nullptr;
  int width = 1;
  std::int64_t blocks = 1, super_groups = 1, super_group = 1, flush_blocks = 1;
  // Result: panel p at c + p * rows * 16, int32 or float32 [rows][16].
  void* c = nullptr;
  std::int32_t* chunk = nullptr;   // hybrid: the same shape, scratch for unfinished chunks
  const char* prefetch = nullptr;  // the next unit's weights, as many bytes as this one's
};

enum class FloatWeight : std::uint8_t { bf16, fp16, int4 };

struct FloatUnit {
  const void* a = nullptr;    // float32 rows (AMX: bf16)
  std::int64_t a_stride = 0;  // bytes
  int rows = 0;
  FloatWeight format = FloatWeight::bf16;
  const std::uint8_t* w = nullptr;
  std::int64_t panel_bytes = 0;
  std::int64_t k = 0, group = 0;  // group = k where there are no groups
  // int4: v = sum over groups of partial * (sw * sa): sa [rows], sw [2 panels][groups][16]. Null: no scales.
  const float* sa = nullptr;
  const float* sw = nullptr;
  std::int64_t groups = 1;
  float* c = nullptr;  // [2][rows][16]
  const char* prefetch = nullptr;
};

using IntKernel = void (*)(const IntUnit&);
using FloatKernel = void (*)(const FloatUnit&);

// What an engine on `isa` runs.
struct Kernels {
  IntKernel integer;
  FloatKernel floating;
  RowFormat integer_rows;
  int row_tile;       // rows of a register tile: row blocks are multiples of it
  int block_padding;  // K-blocks of a row are padded with zeros to a multiple of this many elements
};
Kernels kernels_for(Isa isa);
// bf16 x bf16 on AMX needs K a multiple of 32; null where there is none.
FloatKernel amx_bf16_kernel(Isa isa, std::int64_t k);

void int_kernel_portable(const IntUnit& u);
void int_kernel_avx2(const IntUnit& u);
void int_kernel_vnni(const IntUnit& u);
void int_kernel_amx(const IntUnit& u);
void float_kernel(const FloatUnit& u);           // the best of this machine
void float_kernel_portable(const FloatUnit& u);  // the baseline
void float_kernel_amx(const FloatUnit& u);

}  // namespace octomoe::cpu
