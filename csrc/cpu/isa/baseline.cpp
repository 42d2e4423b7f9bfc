// The platform's own instruction set: SSE2 on x86-64, NEON on aarch64.
#define HPA_ISA_NAMESPACE baseline
#define HPA_ISA_TABLE baseline_table
#define HPA_ISA_NAME "baseline"
#define HPA_VECTOR_BYTES 16
// Sums of a tile must fit the registers beside its operands: 16 of them on x86-64, 32 on aarch64.
#ifdef __aarch64__
#define HPA_TILE_VECTORS 4
#else
#define HPA_TILE_VECTORS 2
#endif
#define HPA_TILE_ROWS 4
#include "kernels.inl"
