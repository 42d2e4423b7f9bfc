// Chooses the inner loops once, at the first call: what the CPU has, the operating system saves and (AMX) the kernel
// permits, or what HPA_ISA names.  A table that lacks something inherits it from the one below.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"

#ifdef HPA_X86_ISA
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hpa::isa {
namespace {

struct Candidate {
  const char* name;
  const Table* table;      // null where it cannot run
  std::string impediment;  // why
  bool pays;               // else it is there for HPA_ISA and select() only
};

#ifdef HPA_X86_ISA

bool bit(unsigned word, int index) { return (word >> index & 1u) != 0; }

// What the first thing missing is for AMX with bfloat16, or nothing.
std::string amx_impediment() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(d, 24) || !bit(d, 22)) return "the CPU has no AMX-BF16";
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return "the operating system does not use XSAVE";
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!bit(low, 17) || !bit(low, 18)) return "the operating system does not save AMX tiles (XCR0)";
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return "the kernel does not permit AMX tiles (arch_prctl ARCH_REQ_XCOMP_PERM)";
  }
  return "";
#else
  return "only Linux is known to permit AMX tiles";
#endif
}

// The AVX-512 table with products of pairs of bfloat16.
Table with_pairs(const char* name, const Product<std::uint32_t, float>& pairs) {
  Table table = avx512_table;
  table.name = name;
  table.pairs = &pairs;
  return table;
}

#endif

std::vector<Candidate> find_candidates() {
  std::vector<Candidate> all;
  const auto add = [&](const char* name, const Table* table, const std::string& impediment, bool pays = true) {
    all.push_back({name, impediment.empty() ? table : nullptr, impediment, pays});
  };
  add("baseline", &baseline_table, "");
#ifdef HPA_X86_ISA
  __builtin_cpu_init();
  // The built-in test looks at CPUID and at XCR0, the registers that the operating system saves.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const std::string no_avx512 = avx512 ? "" : "the CPU or the operating system has no AVX-512 (F, BW, DQ, VL)";
  add("avx2", &avx2_table, avx2 ? "" : "the CPU or the operating system has no AVX2, FMA and F16C");
  add("avx512", &avx512_table, no_avx512);
#ifdef HPA_AVX512BF16
  static const Table avx512bf16_table = with_pairs("avx512bf16", avx512bf16_pairs);
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Intel's cores begin a VDPBF16PS of 64 bytes in the time of four multiply-adds (measured on family 6, model 207):
  // pairs take twice as long there as float32.
  add("avx512bf16", &avx512bf16_table, bf16 || !avx512 ? no_avx512 : "the CPU has no AVX512_BF16",
      !__builtin_cpu_is("intel"));
#else
  add("avx512bf16", nullptr, "the compiler that built hpa-ext does not know it");
#endif
#ifdef HPA_AMX
  static const Table amx_table = with_pairs("amx", amx_pairs);
  add("amx", &amx_table, avx512 ? amx_impediment() : no_avx512);
#else
  add("amx", nullptr, "the compiler that built hpa-ext does not know it");
#endif
#endif
  return all;
}

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = find_candidates();
  return all;
}

const Table* find(const std::string& name, const char* source) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    if (name == candidate.name) {
      if (candidate.table != nullptr) return candidate.table;
      throw std::invalid_argument(std::string(source) + ": cannot run '" + name + "' here: " + candidate.impediment);
    }
    known += (known.empty() ? "'" : ", '") + std::string(candidate.name) + "'";
  }
  throw std::invalid_argument(std::string(source) + ": expected one of " + known + ", got '" + name + "'");
}

const Table* choose() {
  const char* forced = std::getenv("HPA_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced, "HPA_ISA");
  const Table* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    if (candidate.table != nullptr && candidate.pays) best = candidate.table;
  }
  return best;
}

std::atomic<const Table*> current{nullptr};

}  // namespace

const Table& active() {
  const Table* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = choose();  // two threads that get here together choose the same
    current.store(table, std::memory_order_release);
  }
  return *table;
}

const Kernels<double>& narrow() {
  const Table& table = active();
#ifdef HPA_X86_ISA
  if (table.f64.panel > avx2_table.f64.panel) return avx2_table.f64;  // which every CPU with AVX-512 runs
#endif
  return table.f64;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.table != nullptr) names.emplace_back(candidate.name);
  }
  return names;
}

void select(const std::string& name) { current.store(find(name, "isa"), std::memory_order_release); }

}  // namespace hpa::isa
