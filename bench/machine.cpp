// The most this machine does: GB/s of memory and GFLOP/s of arithmetic, with a given number of threads.
//
// Built by machine.py with the system compiler and -O3 -march=native, and called on memory that torch allocated, so that
// pages are of the kind that the kernels get.  There are several ways to write each loop (number of streams, distance of
// prefetching, kind of store); machine.py tries them all and keeps the fastest.
//
//   read    every byte of b                     bytes counted: n
//   copy    a = b                                              2 n
//   scale   a = s a, in place                                  2 n
//   update  a = s a + b, in place                              3 n
//   fp32    fused multiply-adds in registers    flops counted: 2 a lane
//   bf16    products of bfloat16 summed in float32: AMX tiles, else vdpbf16ps, else widening to fp32 (the fp32 limit)
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kWidth = 32, kChains = 12;
#else
constexpr int kWidth = 16, kChains = 12;
#endif
constexpr std::int64_t kLine = 64;
using Floats = float __attribute__((vector_size(kWidth), aligned(4), may_alias));
using Words = std::uint64_t __attribute__((vector_size(kWidth), aligned(8), may_alias));
constexpr int kLanes = kWidth / 4;

volatile float sink;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Time in which all threads have run body(thread).  They wait for each other by spinning: a thread that has to be woken
// would be counted as work.
template <class Body>
double seconds_of(int threads, const Body& body) {
  std::atomic<int> arrived{0};
  const auto meet = [&](int round) {
    arrived.fetch_add(1);
    while (arrived.load() < threads * round) std::this_thread::yield();
  };
  double seconds = 0;
  const auto work = [&](int thread) {
    meet(1);
    const double start = seconds_now();
    body(thread);
    meet(2);
    if (thread == 0) seconds = seconds_now() - start;
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) team.emplace_back(work, thread);
  work(0);
  for (std::thread& member : team) member.join();
  return seconds;
}

// ---- Memory ----------------------------------------------------------------------------------------------------------

struct Span {
  char* a;
  const char* b;
  std::int64_t bytes;  // a multiple of kLine * 16
};

// Runs line(offset) over a span that is cut into `Streams` parts which advance together: several open pages keep more of
// the memory's banks and of the core's prefetchers at work than one.
template <int Streams, class Line>
void stream(const Span& span, const Line& line) {
  const std::int64_t part = span.bytes / Streams;
  for (std::int64_t i = 0; i < part; i += kLine) {
    for (int s = 0; s < Streams; ++s) line(s * part + i);
  }
}

template <int Streams, int Ahead>
void read(const Span& span) {
  Words sum[kLine / kWidth] = {};
  stream<Streams>(span, [&](std::int64_t at) {
    if (Ahead != 0) __builtin_prefetch(span.b + at + Ahead);
    for (int k = 0; k < kLine / kWidth; ++k) sum[k] |= *reinterpret_cast<const Words*>(span.b + at + k * kWidth);
  });
  std::uint64_t all = 0;
  for (const Words& part : sum) {
    for (int lane = 0; lane < kWidth / 8; ++lane) all |= part[lane];
  }
  sink = static_cast<float>(all);
}

template <int Streams, int Ahead>
void scale(const Span& span) {
  const Floats factor = Floats{} + 0.999f;
  stream<Streams>(span, [&](std::int64_t at) {
    if (Ahead != 0) __builtin_prefetch(span.a + at + Ahead, 1);
    for (int k = 0; k < kLine / kWidth; ++k) *reinterpret_cast<Floats*>(span.a + at + k * kWidth) *= factor;
  });
}

template <int Streams, int Ahead>
void update(const Span& span) {
  const Floats factor = Floats{} + 0.999f;
  stream<Streams>(span, [&](std::int64_t at) {
    if (Ahead != 0) __builtin_prefetch(span.a + at + Ahead, 1), __builtin_prefetch(span.b + at + Ahead);
    for (int k = 0; k < kLine / kWidth; ++k) {
      Floats& out = *reinterpret_cast<Floats*>(span.a + at + k * kWidth);
      out = out * factor + *reinterpret_cast<const Floats*>(span.b + at + k * kWidth);
    }
  });
}

void copy_by_library(const Span& span) { std::memcpy(span.a, span.b, static_cast<std::size_t>(span.bytes)); }

// Stores that go past the caches do not fetch the lines they overwrite.
template <int Streams, int Ahead>
void copy_past_the_caches(const Span& span) {
#if defined(__SSE2__)
  stream<Streams>(span, [&](std::int64_t at) {
    if (Ahead != 0) __builtin_prefetch(span.b + at + Ahead);
    for (int k = 0; k < kLine / 16; ++k) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(span.a + at) + k,
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(span.b + at) + k));
    }
  });
  _mm_sfence();
#else
  copy_by_library(span);
#endif
}

using Pass = void (*)(const Span&);

double memory_rate(Pass pass, double counted, const Span& whole, int threads) {
  constexpr std::int64_t kGrain = kLine * 16;
  const std::int64_t share = whole.bytes / threads / kGrain * kGrain;
  const double seconds =
      seconds_of(threads, [&](int thread) { pass({whole.a + thread * share, whole.b + thread * share, share}); });
  return counted * static_cast<double>(share * threads) / seconds;
}

// ---- Arithmetic ------------------------------------------------------------------------------------------------------

volatile float one_of_many = 0.999f, small_number = 0.001f;  // volatile: the compiler must not fold the chains

// Independent chains, enough to cover the latency of a multiply-add and few enough to stay in registers.
void fp32_chains(std::int64_t steps) {
  const Floats factor = Floats{} + one_of_many, term = Floats{} + small_number;
  Floats chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = term * static_cast<float>(c);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chain[c] = chain[c] * factor + term;
  }
  Floats sum = {};
  for (int c = 0; c < kChains; ++c) sum += chain[c];
  sink = sum[0];
}

double fp32_rate(int threads) {
  constexpr std::int64_t kSteps = 2'000'000;
  return 2.0 * kLanes * kChains * kSteps * threads / seconds_of(threads, [](int) { fp32_chains(kSteps); });
}

double pairs_rate([[maybe_unused]] int threads) {
#if !defined(__AVX512BF16__)
  return 0;
#else
  constexpr std::int64_t kSteps = 2'000'000;
  return 4.0 * kLanes * kChains * kSteps * threads / seconds_of(threads, [](int) {
           const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(one_of_many), _mm512_set1_ps(small_number));
           __m512 chain[kChains];
           for (int c = 0; c < kChains; ++c) chain[c] = _mm512_set1_ps(static_cast<float>(c));
           for (std::int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
             for (int c = 0; c < kChains; ++c) chain[c] = _mm512_dpbf16_ps(chain[c], factor, factor);
           }
           __m512 sum = _mm512_setzero_ps();
           for (int c = 0; c < kChains; ++c) sum = _mm512_add_ps(sum, chain[c]);
           sink = _mm512_cvtss_f32(sum);
         });
#endif
}

double tiles_rate([[maybe_unused]] int threads) {
#if !defined(__AMX_BF16__) || !defined(__linux__)
  return 0;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // the kernel hands out the tile registers on request
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  constexpr std::int64_t kSteps = 200'000;
  constexpr double kFlops = 2.0 * 16 * 16 * 32;
  return 4 * kFlops * kSteps * threads / seconds_of(threads, [](int) {
           struct alignas(64) {
             std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
             std::uint16_t row_bytes[16] = {};
             std::uint8_t rows[16] = {};
           } config;
           for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
           _tile_loadconfig(&config);
           _tile_zero(0);
           _tile_zero(1);
           _tile_zero(2);
           _tile_zero(3);
           _tile_zero(4);
           _tile_zero(5);
           _tile_zero(6);
           _tile_zero(7);
           for (std::int64_t step = 0; step < kSteps; ++step) {
             _tile_dpbf16ps(0, 4, 6);
             _tile_dpbf16ps(1, 4, 7);
             _tile_dpbf16ps(2, 5, 6);
             _tile_dpbf16ps(3, 5, 7);
           }
           _tile_release();
         });
#endif
}

constexpr Pass kRead[] = {read<1, 0>, read<1, 1024>, read<2, 1024>, read<4, 512>, read<4, 1024>, read<8, 512>};
constexpr Pass kCopy[] = {copy_by_library, copy_past_the_caches<1, 1024>, copy_past_the_caches<2, 1024>,
                          copy_past_the_caches<4, 512>};
constexpr Pass kScale[] = {scale<1, 0>, scale<1, 1024>, scale<2, 1024>, scale<4, 512>};
constexpr Pass kUpdate[] = {update<1, 0>, update<1, 1024>, update<2, 512>, update<2, 1024>, update<4, 512>};

template <std::size_t Count>
double memory_way(const Pass (&ways)[Count], int way, double counted, const Span& whole, int threads) {
  return way < static_cast<int>(Count) ? memory_rate(ways[way], counted, whole, threads) : -1;
}

}  // namespace

// Bytes or flops a second, once, by the way of that number; 0 where the machine lacks the way, -1 where there are no
// more.  a and b are separate blocks of `bytes` bytes that have been written before.
extern "C" double machine_rate(const char* limit, int way, void* a, const void* b, std::int64_t bytes, int threads) {
  const std::string_view name = limit;
  const Span whole = {static_cast<char*>(a), static_cast<const char*>(b), bytes};
  if (name == "read") return memory_way(kRead, way, 1, whole, threads);
  if (name == "copy") return memory_way(kCopy, way, 2, whole, threads);
  if (name == "scale") return memory_way(kScale, way, 2, whole, threads);
  if (name == "update") return memory_way(kUpdate, way, 3, whole, threads);
  if (name == "fp32" && way == 0) return fp32_rate(threads);
  if (name == "bf16" && way == 0) return fp32_rate(threads);
  if (name == "bf16" && way == 1) return pairs_rate(threads);
  if (name == "bf16" && way == 2) return tiles_rate(threads);
  return -1;
}
