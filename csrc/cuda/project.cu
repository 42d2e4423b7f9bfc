// g -= sum_k <g, q_k> q_k  for each of m vectors g         grads[i] [m, *shape_i], basis[i] [rank, *shape_i]
//
// Arithmetic   float32, or float64 where any argument is.  Dot products: float32 over a chunk (at most 32 elements a
//              thread, then a tree over 256 threads), float64 over chunks and over the list.  g is rounded to its
//              storage dtype once a pass.
// Bytes moved  One vector: grads read twice and written once, basis read twice, the minimum for dot products that must
//              be finished before they are used; grads are read once more for each 16 further rows of the basis, from
//              the second-level cache.  Many vectors: eight share a reading of the basis.
// Bound        memory for one vector; for many, loads from the second-level cache.
// Design       Two kernels a pass.  The first gives each block a chunk of elements, and 1 vector with 16 rows of the
//              basis or 8 with 8; the block that comes last for these coefficients adds the chunks in a fixed order.
//              The second takes the combination out of each chunk.  Lists are tables in the kernels' parameters; four
//              elements a load (128 bits for float32) where slices are contiguous and aligned.  No atomic addition of
//              floats: the same bits on every run.
// Resident     blocks of 256 threads: coefficients_kernel<*, 1, 16> 2, coefficients_kernel<*, 8, 8> 1,
//              subtract_kernel<*, 1> 2, subtract_kernel<*, 8> 1.  With 32 rows of the basis a thread needs more than
//              the 128 registers that two blocks leave it.
#include "project.cuh"

#include <algorithm>

#include "elements.cuh"
#include "hpa/check.h"
#include "launch.cuh"
#include "slices.h"

namespace hpa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEntries = 200;
constexpr std::int64_t kLong = 1 << 20;  // elements from which on chunks are long

enum Role { kGrad, kBasis, kRoles };

struct Entry {
  void* data[kRoles];
  std::int64_t cols, elements;
  std::int64_t vector_stride[kRoles], row_stride[kRoles], col_stride[kRoles];
  DType dtype[kRoles];
  bool four_at_a_time;
};

struct Table {
  Entry entries[kEntries];
  std::int64_t first_chunk[kEntries + 1];
  int count;
};
static_assert(sizeof(Table) <= 32000, "kernel parameters take 32764 bytes");

struct Shape {
  std::int64_t vectors, rank;
  std::int64_t vector_groups, rank_groups;
  std::int64_t chunk;           // elements of a block
  std::int64_t chunks;          // of the whole list
  std::int64_t chunks_before;   // of tables before this one
};

struct Place {
  const Entry* entry;
  std::int64_t start, stop;
};

__device__ __forceinline__ Place find_chunk(const Table& table, const Shape& shape, std::int64_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_chunk[middle] <= chunk ? low : high) = middle;
  }
  const Entry& entry = table.entries[low];
  const std::int64_t start = (chunk - table.first_chunk[low]) * shape.chunk;
  return {&entry, start, min(start + shape.chunk, entry.elements)};
}

// Elements [at, at + Count) of a vector; Count is 4 where the entry is read four at a time.
template <class T, int Count>
__device__ __forceinline__ void load(const Entry& entry, Role role, std::int64_t vector, std::int64_t at,
                                     T (&values)[Count]) {
  const std::int64_t base = vector * entry.vector_stride[role];
  if constexpr (Count == 4) {
    load_four(entry.data[role], entry.dtype[role], base + at, values);
  } else {
    const std::int64_t row = at / entry.cols, col = at % entry.cols;
    values[0] = load_element<T>(entry.data[role], entry.dtype[role],
                                base + row * entry.row_stride[role] + col * entry.col_stride[role]);
  }
}

template <class T, int Vectors, int Ranks, int Count>
__device__ __forceinline__ void add_products(const Entry& entry, std::int64_t start, std::int64_t stop,
                                             std::int64_t first_vector, std::int64_t vectors, std::int64_t first_rank,
                                             std::int64_t ranks, T (&sums)[Vectors * Ranks]) {
  for (std::int64_t at = start + static_cast<int>(threadIdx.x) * Count; at < stop; at += kThreads * Count) {
    T grads[Vectors][Count] = {};
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      if (v < vectors) load<T, Count>(entry, kGrad, first_vector + v, at, grads[v]);
    }
#pragma unroll
    for (int k = 0; k < Ranks; ++k) {
      T row[Count] = {};
      if (k < ranks) load<T, Count>(entry, kBasis, first_rank + k, at, row);
#pragma unroll
      for (int v = 0; v < Vectors; ++v) {
#pragma unroll
        for (int e = 0; e < Count; ++e) sums[v * Ranks + k] += grads[v][e] * row[e];
      }
    }
  }
}

template <class T, int Vectors, int Ranks>
__global__ void __launch_bounds__(kThreads, Vectors == 1 ? 2 : 1)
    coefficients_kernel(const __grid_constant__ Table table, const Shape shape, double* partial, unsigned* counters,
                        T* coefficients, const long long* bad_row) {
  constexpr int kSums = Vectors * Ranks;
  HPA_SHARED(T, warp_sums, kWarps * kSums);
  HPA_SHARED(double, part_sums, kThreads);
  HPA_SHARED(unsigned, flag, 1);
  if (bad_row != nullptr && *bad_row < kNoRow) return;
  const std::int64_t here = table.first_chunk[table.count];
  const std::int64_t chunk = blockIdx.x % here, tile = blockIdx.x / here;
  const std::int64_t first_vector = tile % shape.vector_groups * Vectors;
  const std::int64_t first_rank = tile / shape.vector_groups * Ranks;
  const std::int64_t vectors = min(static_cast<std::int64_t>(Vectors), shape.vectors - first_vector);
  const std::int64_t ranks = min(static_cast<std::int64_t>(Ranks), shape.rank - first_rank);

  const Place place = find_chunk(table, shape, chunk);
  T sums[kSums] = {};
  if (place.entry->four_at_a_time) {
    const std::int64_t fours = place.start + (place.stop - place.start) / 4 * 4;
    add_products<T, Vectors, Ranks, 4>(*place.entry, place.start, fours, first_vector, vectors, first_rank, ranks, sums);
    add_products<T, Vectors, Ranks, 1>(*place.entry, fours, place.stop, first_vector, vectors, first_rank, ranks, sums);
  } else {
    add_products<T, Vectors, Ranks, 1>(*place.entry, place.start, place.stop, first_vector, vectors, first_rank, ranks,
                                       sums);
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const T sum = warp_sum(sums[i]);
    if (lane_index() == 0) warp_sums[warp_index() * kSums + i] = sum;
  }
  __syncthreads();
  double* mine = partial + tile * shape.chunks * kSums;
  if (threadIdx.x < kSums) {
    T sum = T(0);
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * kSums + static_cast<int>(threadIdx.x)];
    mine[(shape.chunks_before + chunk) * kSums + threadIdx.x] = sum;
  }

  if (is_last_block(counters + tile, static_cast<unsigned>(shape.chunks), flag)) {
    constexpr int kParts = kThreads / kSums;
    const int i = static_cast<int>(threadIdx.x) % kSums, part = static_cast<int>(threadIdx.x) / kSums;
    double sum = 0;
    for (std::int64_t c = part; c < shape.chunks; c += kParts) sum += __ldcg(mine + c * kSums + i);
    part_sums[threadIdx.x] = sum;
    __syncthreads();
    const int vector = i / Ranks, rank = i % Ranks;
    if (part == 0 && vector < vectors && rank < ranks) {
      for (int p = 1; p < kParts; ++p) sum += part_sums[p * kSums + i];
      coefficients[(first_vector + vector) * shape.rank + first_rank + rank] = static_cast<T>(sum);
    }
  }
}

template <class T, int Vectors, int Count>
__device__ __forceinline__ void subtract(const Entry& entry, std::int64_t start, std::int64_t stop,
                                         std::int64_t first_vector, std::int64_t vectors, std::int64_t rank,
                                         const T* coefficients) {
  for (std::int64_t at = start + static_cast<int>(threadIdx.x) * Count; at < stop; at += kThreads * Count) {
    T sums[Vectors][Count] = {};
#pragma unroll 4
    for (std::int64_t k = 0; k < rank; ++k) {
      T row[Count];
      load<T, Count>(entry, kBasis, k, at, row);
#pragma unroll
      for (int v = 0; v < Vectors; ++v) {
        const T factor = v < vectors ? coefficients[(first_vector + v) * rank + k] : T(0);
#pragma unroll
        for (int e = 0; e < Count; ++e) sums[v][e] += factor * row[e];
      }
    }
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      if (v >= vectors) continue;
      T grads[Count];
      load<T, Count>(entry, kGrad, first_vector + v, at, grads);
#pragma unroll
      for (int e = 0; e < Count; ++e) grads[e] -= sums[v][e];
      const std::int64_t base = (first_vector + v) * entry.vector_stride[kGrad];
      if constexpr (Count == 4) {
        store_four(entry.data[kGrad], entry.dtype[kGrad], base + at, grads);
      } else {
        const std::int64_t row = at / entry.cols, col = at % entry.cols;
        store_element(entry.data[kGrad], entry.dtype[kGrad],
                      base + row * entry.row_stride[kGrad] + col * entry.col_stride[kGrad], grads[0]);
      }
    }
  }
}

template <class T, int Vectors>
__global__ void __launch_bounds__(kThreads, Vectors == 1 ? 2 : 1)
    subtract_kernel(const __grid_constant__ Table table, const Shape shape, const T* coefficients,
                    const long long* bad_row) {
  if (bad_row != nullptr && *bad_row < kNoRow) return;
  const std::int64_t here = table.first_chunk[table.count];
  const std::int64_t chunk = blockIdx.x % here, first_vector = blockIdx.x / here * Vectors;
  const std::int64_t vectors = min(static_cast<std::int64_t>(Vectors), shape.vectors - first_vector);
  const Place place = find_chunk(table, shape, chunk);
  std::int64_t fours = place.start;
  if (place.entry->four_at_a_time) {
    fours += (place.stop - place.start) / 4 * 4;
    subtract<T, Vectors, 4>(*place.entry, place.start, fours, first_vector, vectors, shape.rank, coefficients);
  }
  subtract<T, Vectors, 1>(*place.entry, fours, place.stop, first_vector, vectors, shape.rank, coefficients);
}

void append_entries(const TensorView& grad, const TensorView& basis, std::vector<Entry>& entries) {
  const TensorView* const tensors[kRoles] = {&grad, &basis};
  for (const Piece<kRoles>& piece : cut_into_pieces<kRoles>(grad, 1, tensors)) {
    Entry entry = {};
    entry.cols = piece.cols;
    entry.elements = piece.rows * piece.cols;
    entry.four_at_a_time = piece.rows == 1;
    for (int role = 0; role < kRoles; ++role) {
      const std::int64_t size = element_size(tensors[role]->dtype), together = std::min<std::int64_t>(16, 4 * size);
      entry.data[role] = static_cast<char*>(tensors[role]->data) + piece.offset[role] * size;
      entry.dtype[role] = tensors[role]->dtype;
      entry.vector_stride[role] = tensors[role]->stride[0];
      entry.row_stride[role] = piece.row_stride[role];
      entry.col_stride[role] = piece.col_stride[role];
      entry.four_at_a_time = entry.four_at_a_time && piece.col_stride[role] == 1 &&
                             aligned(entry.data[role], together) &&
                             (tensors[role]->shape[0] <= 1 || tensors[role]->stride[0] * size % together == 0);
    }
    entries.push_back(entry);
  }
}

template <class T, int Vectors, int Ranks>
void run(Context& context, const std::vector<Entry>& entries, Shape shape, const long long* bad_row) {
  shape.vector_groups = div_up(shape.vectors, Vectors);
  shape.rank_groups = div_up(shape.rank, Ranks);
  std::vector<Table> tables;
  for (std::size_t first = 0; first < entries.size(); first += kEntries) {
    Table table = {};
    table.count = static_cast<int>(std::min<std::size_t>(kEntries, entries.size() - first));
    for (int i = 0; i < table.count; ++i) {
      table.entries[i] = entries[first + static_cast<std::size_t>(i)];
      table.first_chunk[i + 1] = table.first_chunk[i] + div_up(table.entries[i].elements, shape.chunk);
    }
    shape.chunks += table.first_chunk[table.count];
    tables.push_back(table);
  }
  const std::int64_t tiles = shape.vector_groups * shape.rank_groups;
  T* coefficients = allocate<T>(context, shape.vectors * shape.rank);
  auto* partial = allocate<double>(context, tiles * shape.chunks * Vectors * Ranks);
  unsigned* counters = zeroed_counters(context, tiles);
  for (const Table& table : tables) {
    const std::int64_t here = table.first_chunk[table.count];
    launch(context, tiles * here, kThreads, coefficients_kernel<T, Vectors, Ranks>, table, shape, partial, counters,
           coefficients, bad_row);
    shape.chunks_before += here;
  }
  for (const Table& table : tables) {
    launch(context, shape.vector_groups * table.first_chunk[table.count], kThreads, subtract_kernel<T, Vectors>, table,
           shape, coefficients, bad_row);
  }
}

template <class T>
void run(Context& context, const std::vector<Entry>& entries, const Shape& shape, const long long* bad_row) {
  if (shape.vectors <= 2) {
    run<T, 1, 16>(context, entries, shape, bad_row);
  } else {
    run<T, 8, 8>(context, entries, shape, bad_row);
  }
}

}  // namespace

void project_once(Context& context, const std::vector<TensorView>& grads, const std::vector<TensorView>& basis,
                  const long long* bad_row) {
  check(!grads.empty() && grads.size() == basis.size(), "basis", "expected as many tensors as grads, at least one");
  Shape shape = {};
  std::int64_t elements = 0;
  bool wide = false;
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    check_float("grads", grads[i]);
    check_float("basis", basis[i]);
    check(grads[i].dims >= 1 && basis[i].dims == grads[i].dims, "basis", "expected as many dimensions as grads");
    check(std::equal(grads[i].shape + 1, grads[i].shape + grads[i].dims, basis[i].shape + 1), "basis",
          "expected the shapes of grads after the first dimension");
    if (i == 0) shape.vectors = grads[i].shape[0], shape.rank = basis[i].shape[0];
    check(grads[i].shape[0] == shape.vectors, "grads", "expected equal first dimensions");
    check(basis[i].shape[0] == shape.rank, "basis", "expected equal first dimensions");
    wide = wide || grads[i].dtype == DType::f64 || basis[i].dtype == DType::f64;
    if (shape.vectors > 0) elements += grads[i].numel() / shape.vectors;
    append_entries(grads[i], basis[i], entries);
  }
  if (shape.vectors == 0 || shape.rank == 0 || entries.empty()) return;
  shape.chunk = (elements >= kLong ? 8 : 2) * 4 * kThreads;
  if (wide) {
    run<double>(context, entries, shape, bad_row);
  } else {
    run<float>(context, entries, shape, bad_row);
  }
}

void project(Context& context, const std::vector<TensorView>& grads, const std::vector<TensorView>& basis, int passes) {
  const DeviceGuard guard(context);
  for (int pass = 0; pass < passes; ++pass) project_once(context, grads, basis, nullptr);
}

}  // namespace hpa::cuda
