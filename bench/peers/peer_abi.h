/* The C interface of a peer's GEMMs in a shared library: bench/gpu_peers.py --library FILE.

   Problem: group g has rows[g] rows; a int8 [sum of rows, k], b int8 [groups, n, k], a_scale float32 [sum of rows],
   b_scale float32 [groups, n], d bfloat16 [sum of rows, n]: d = a_scale * b_scale * (a . b^T). All but `rows` is memory
   of the current device. Variants are tiles or forms; the fastest of every form (its name up to the first digit)
   is timed beside the others. A name with "batched" in it gets the same number of rows in every group. */
#pragma once
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef struct {
  int32_t groups, n, k;
  const int32_t* rows; /* on the host */
  const void* a;
  const void* b;
  const float* a_scale;
  const float* b_scale;
  void* d;
} peer_problem;

const char* peer_version(void); /* "CUTLASS 4.2.0" */
int peer_count(void);
const char* peer_name(int variant);
/* Everything that may allocate or wait; NULL and peer_error() if the variant cannot do it. */
void* peer_prepare(int variant, const peer_problem* problem);
/* Launches on the stream (a cudaStream_t) and returns 0; may be captured into a graph. */
int peer_run(void* handle, void* stream);
void peer_release(void* handle);
const char* peer_error(void);

/* The grouped hybrid GEMM of the reference project, --reference-library FILE. a_q int32 [scale_rows, k/128] and a_f
   float32 [scale_rows, super groups] have a row for each tile_rows rows of an expert; b_q, b_f [groups, n/64, ...];
   sizes int32 [groups, 3] of (rows, n, k), offsets int32 [groups + 1], scale_offsets int32 [groups]: an expert's first
   scale row. tile_rows is 128 or 64. 0, or a CUDA error. */
int hybrid_grouped_gemm(int tile_rows, const void* a, const int32_t* a_q, const float* a_f, const void* b,
                        const int32_t* b_q, const float* b_f, const int32_t* offsets, const int32_t* sizes,
                        const int32_t* scale_offsets, void* d, int groups, int n, int k, int rows, int scale_rows,
                        int super_group, void* stream);
#ifdef __cplusplus
}
#endif
