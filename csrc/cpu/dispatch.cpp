// Chooses the inner loops once, at the first call: what the CPU has and the operating system saves (the built-in test
// looks at CPUID and XCR0), or what HPA_ISA names.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa/isa.h"

namespace hpa::isa {
namespace {

struct Candidate {
  const Table* table;
  bool runs;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> all = {{&baseline_table, true}};
#ifdef HPA_X86_ISA
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&avx2_table, avx2});
  all.push_back({&avx512_table, avx512});
#endif
  return all;
}

const Table* find(const std::string& name, const char* source) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    if (name == candidate.table->name) {
      if (candidate.runs) return candidate.table;
      throw std::invalid_argument(std::string(source) + ": this CPU cannot run '" + name + "'");
    }
    known += (known.empty() ? "'" : ", '") + std::string(candidate.table->name) + "'";
  }
  throw std::invalid_argument(std::string(source) + ": expected one of " + known + ", got '" + name + "'");
}

const Table* choose() {
  const char* forced = std::getenv("HPA_ISA");
  if (forced != nullptr && *forced != '\0') return find(forced, "HPA_ISA");
  const Table* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) best = candidate.table;
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

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) names.emplace_back(candidate.table->name);
  }
  return names;
}

void select(const std::string& name) { current.store(find(name, "isa"), std::memory_order_release); }

}  // namespace hpa::isa
