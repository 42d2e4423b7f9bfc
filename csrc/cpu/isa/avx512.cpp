// AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes, 24 of them sums of a tile.
#define HPA_ISA_NAMESPACE avx512
#define HPA_ISA_TABLE avx512_table
#define HPA_ISA_NAME "avx512"
#define HPA_VECTOR_BYTES 64
#define HPA_TILE_VECTORS 3
#define HPA_TILE_ROWS 8
#include "kernels.inl"
