// AVX2 and FMA: 16 registers of 32 bytes, 12 of them sums of a tile.
#define HPA_ISA_NAMESPACE avx2
#define HPA_ISA_TABLE avx2_table
#define HPA_ISA_NAME "avx2"
#define HPA_VECTOR_BYTES 32
#define HPA_TILE_VECTORS 3
#define HPA_TILE_ROWS 4
#include "kernels.inl"
