// The inner loops, once for each instruction set.
//
// kernels.inl is compiled several times, each time in a file and a namespace of its own with flags of its own, and
// fills one Table.  Everything else in csrc/cpu is compiled for the platform's baseline and calls through the active
// table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hpa/tensor_view.h"

namespace hpa::isa {

// Most rows of a matrix that one call of add_dots or subtract_rows takes.
inline constexpr int kRows = 8;

// C += alpha * A A^T on packed operands, sums in T.  An entry E of the depth is one element (E = T), or a pair of
// bfloat16 values that lie one after the other in the depth (E = std::uint32_t).
//
// A is packed twice.  As the right operand in panels, `panel` lanes side by side: [depth][panel].  As the left operand
// in the order in which a tile reads its rows, which is the implementation's own; turn() makes it from a panel.
template <class E, class T>
struct Product {
  std::int64_t panel;
  std::int64_t depth;  // entries of one sum in registers, the most for which the caches serve the loops
  std::int64_t round;  // depths are multiples of this, padded with zeros
  std::int64_t block;  // lanes of a square block of C whose operands stay in the second-level cache

  // `depth` values (not entries) of `lanes` lanes, strides in elements; panel k goes to right + k * pitch.  The last
  // panel and the last entries are padded with zeros.  Null for a dtype that E cannot hold.
  using Pack = void (*)(const void* source, std::int64_t lane_stride, std::int64_t depth_stride, std::int64_t lanes,
                        std::int64_t depth, E* right, std::int64_t pitch);
  Pack pack[kFloatTypes];
  void (*turn)(std::int64_t depth, const E* right, E* left);

  // c[i][j] += alpha * (carry[i][j] + sum_d left[d][i] right[d][j]) for i < rows, j < cols and j <= i + reach.
  // carry [panel][panel], the sums over other depths, may be null.
  void (*multiply)(std::int64_t depth, const E* left, const E* right, T alpha, std::int64_t rows, std::int64_t cols,
                   std::int64_t reach, const T* carry, T* c, std::int64_t stride);

  // Around the calls of multiply() that a thread makes in a row; null where a thread needs no state.
  void (*open)();
  void (*close)();
};

// Most factors of one call of multiply_pairs.
inline constexpr std::int64_t kFactors = 1024;
// A product: 2^exponent and, of each lane, high + low, with high in [1, 2^1023) and |low| <= 2^-43 high.
struct SplitProduct {
  std::int64_t lanes, exponent;
  double high[8], low[8];
};

// Inner loops that compute in T (float or double).  Pointers of type T are contiguous; `void*` sources and targets have
// the dtype that the function's place in its array names, with a stride in elements.
template <class T>
struct Kernels {
  using Load = void (*)(const void* source, std::int64_t stride, std::int64_t count, T* target);
  using Store = void (*)(const T* source, std::int64_t count, void* target, std::int64_t stride);

  Load load[kFloatTypes];    // widened to T; exact, but for f64 read as float
  Store store[kFloatTypes];  // rounded to nearest, ties to even

  // Products are summed in T by lane, lanes in double.
  double (*dot)(const T* a, const T* b, std::int64_t count);
  // out[i] = <a[i], b>, i < 4: b is read once.
  void (*dot4)(const T* const a[4], const T* b, std::int64_t count, double out[4]);
  void (*scale)(double factor, std::int64_t count, T* x);    // x *= factor, rounded once
  double (*sum_of_squares)(const T* x, std::int64_t count);  // in double throughout

  // ---- Rows as they are stored, `number` <= kRows of them; null for a dtype that must be converted to T first. ----
  // sums[r] += <rows[r], x>: products are summed in T by lane, lanes in double.
  using AddDots = void (*)(const void* const* rows, std::int64_t number, const T* x, std::int64_t count, double* sums);
  AddDots add_dots[kFloatTypes];
  // y -= sum_r factors[r] * rows[r].
  using SubtractRows = void (*)(const void* const* rows, std::int64_t number, const T* factors, std::int64_t count,
                                T* y);
  SubtractRows subtract_rows[kFloatTypes];

  std::int64_t cache;  // bytes of a second-level cache that CPUs with these instructions have at least

  void (*add_squares)(const T* g, std::int64_t count, T* total);
  void (*add_abs_products)(const T* g, const T* w, std::int64_t count, T* total);

  // ---- Dense algebra on packed panels: `panel` lanes side by side, [depth][panel]. ----
  std::int64_t panel;

  // sums[lane] += sum_d lanes[d][lane]^2 in double.
  void (*add_lane_squares)(std::int64_t depth, const T* lanes, double* sums);

  // ---- Blocks of a factorisation: lanes also in strips, `strip` lanes side by side, [depth][strip]. ----
  std::int64_t strip;  // divides `panel`

  // c[s][i][j] += alpha * sum_d strips[s][d][i] panel[d][j] for s < count; c [count * strip][panel] contiguous; strips
  // `pitch` elements apart.
  void (*multiply_strips)(std::int64_t depth, std::int64_t count, const T* strips, std::int64_t pitch, const T* panel,
                          T alpha, T* c);
  // Forward substitution in every lane of a panel, L y = x, L lower triangular of order `depth` in strips; rows before
  // `first`, a multiple of `strip`, are known to be zero.
  void (*solve_strips)(std::int64_t depth, std::int64_t first, const T* strips, T* panel);
  // Cholesky of a corner [panel][panel]: upper triangle U in and out, U^T U; what is below the diagonal is overwritten.
  // Returns the number of pivots taken: less than `panel` where the next, left in its place, is not positive and finite.
  std::int64_t (*factor_corner)(T* corner);
  // Forward substitution with U^T in every lane of a panel of depth `panel`.
  void (*solve_corner)(const T* corner, T* panel);
  void (*transpose_square)(const T* from, T* to);                                        // [panel][panel]
  void (*cut_panel)(std::int64_t depth, const T* panel, T* strips, std::int64_t pitch);  // `pitch` as above

  // ---- A few long rows, `pitch` elements apart; `length` is a multiple of `panel`. ----
  // gram[i][j] += <row i, row j> for j <= i; gram [count][count].  Products are summed in T by lane, lanes in double.
  void (*add_row_products)(std::int64_t count, const T* rows, std::int64_t pitch, std::int64_t length, double* gram);
  // products[i][j] += <row i of a, row j of b>, likewise; products [a_count][b_count].
  void (*add_cross_products)(std::int64_t a_count, const T* a, std::int64_t b_count, const T* b, std::int64_t pitch,
                             std::int64_t length, double* products);
  // rows = L^-1 rows by forward substitution, L lower triangular of order `count` in strips.
  void (*substitute_rows)(std::int64_t count, const T* strips, T* rows, std::int64_t pitch, std::int64_t length);

  Product<T, T> product;
  // c[i][j] += alpha * sum_d strip[d][i] panels[j / panel][d][j % panel] for i < rows <= strip, j < cols and
  // j <= i + reach.
  void (*multiply_run)(std::int64_t depth, const T* strip, const T* panels, T alpha, std::int64_t rows,
                       std::int64_t cols, std::int64_t reach, T* c, std::int64_t stride);
};

struct Table {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;

  // For weights [rows, cols] of each dtype, columns side by side, row strides in elements, with change = after - before:
  // column[j] += sum_i change[i, j]^2,  sums += { <change, before>, |before|^2 }.
  using Change = void (*)(const void* before, std::int64_t before_stride, const void* after, std::int64_t after_stride,
                          std::int64_t rows, std::int64_t cols, double* column, double sums[2]);
  Change change[kFloatTypes];

  // hpa::merge on rows of each dtype, columns side by side, row strides in elements.  The mask has, for each column, an
  // integer of the dtype's size: all bits set where the old column is kept.  Kept elements are copied bit by bit.
  using Merge = void (*)(void* after, std::int64_t after_stride, const void* before, std::int64_t before_stride,
                         std::int64_t rows, std::int64_t cols, const void* mask, double projection);
  Merge merge[kFloatTypes];

  // ---- Scores of columns, finite. ----
  bool (*are_scores)(const double* scores, std::int64_t count);  // finite and not negative; here anything may come
  // The count-th largest of the values, 1 <= count <= size; two arrays of scratch for `size` each.
  double (*nth_largest)(const double* values, std::int64_t size, std::int64_t count, double* scratch, double* spare);
  // The scores at places that are marked by 1, in their order, to `kept` (room for `count`); their number.
  std::int64_t (*keep_marked)(const double* scores, const std::uint8_t* marked, std::int64_t count, double* kept);
  // chosen[i] = 1 where scores[i] >= least and, if `marked` is not null, marked[i] is 1; else 0.  Returns their number.
  std::int64_t (*mark_from)(const double* scores, const std::uint8_t* marked, double least, std::int64_t count,
                            std::uint8_t* chosen);
  std::int64_t (*count_marks)(const std::uint8_t* marks, std::int64_t count);  // of bytes that are 0 or 1
  // The products of a[i] and of b[i] over the pairs that are both positive, count <= kFactors; the number of pairs.
  std::int64_t (*multiply_pairs)(const double* a, const double* b, std::int64_t count, SplitProduct products[2]);

  // Products of bfloat16 values two at a time; null where the instruction set has none.
  const Product<std::uint32_t, float>* pairs;

  template <class T>
  const Kernels<T>& kernels() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

extern const Table baseline_table;
#ifdef HPA_X86_ISA
extern const Table avx2_table;
extern const Table avx512_table;
#endif
#ifdef HPA_AVX512BF16
extern const Product<std::uint32_t, float> avx512bf16_pairs;  // beside avx512_table
#endif
#ifdef HPA_AMX
extern const Product<std::uint32_t, float> amx_pairs;  // beside avx512_table
#endif

// The table in use: the best this CPU and operating system can run, unless HPA_ISA or select() names another.
const Table& active();
// Those of the table in use or of one below it whose panels are narrower: a matrix of few columns is padded to panels.
const Kernels<double>& narrow();
// Names of the tables that can run here, slowest first.
std::vector<std::string> available();
// Switches to the table of that name; throws std::invalid_argument where it cannot run.
void select(const std::string& name);

}  // namespace hpa::isa
