// Counts what kernels read from and write to memory that is watched.
//
// Kernels are compiled with -fsanitize=thread, which puts a call before each load and store; here is what is called, in
// place of the sanitizer's library.  Without optimization, so that no two accesses have become one.
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>

#define HPA_EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Range {
  std::uintptr_t end;
  std::uint64_t read = 0, written = 0;
};
std::map<std::uintptr_t, Range> ranges;  // by where they begin

Range* find(const void* address) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const auto after = ranges.upper_bound(at);
  if (after == ranges.begin()) return nullptr;
  Range& range = std::prev(after)->second;
  return at < range.end ? &range : nullptr;
}

void read(const void* address, std::size_t bytes) {
  if (Range* range = find(address)) range->read += bytes;
}
void write(const void* address, std::size_t bytes) {
  if (Range* range = find(address)) range->written += bytes;
}

}  // namespace

HPA_EXPORTED void hpa_counting_watch(const void* address, std::size_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (bytes > 0) ranges[at] = {at + bytes};
}
HPA_EXPORTED void hpa_counting_forget() { ranges.clear(); }
HPA_EXPORTED std::uint64_t hpa_counting_bytes(const void* address, int written) {
  const Range* range = find(address);
  return range == nullptr ? 0 : written != 0 ? range->written : range->read;
}

extern "C" {
void hpa_counting_read(const void* address, std::size_t bytes) { read(address, bytes); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define HPA_COUNT(size)                                                    \
  void __tsan_read##size(void* address) { read(address, size); }           \
  void __tsan_write##size(void* address) { write(address, size); }         \
  void __tsan_unaligned_read##size(void* address) { read(address, size); } \
  void __tsan_unaligned_write##size(void* address) { write(address, size); }
HPA_COUNT(1)
HPA_COUNT(2)
HPA_COUNT(4)
HPA_COUNT(8)
HPA_COUNT(16)
void __tsan_read_range(void* address, std::size_t bytes) { read(address, bytes); }
void __tsan_write_range(void* address, std::size_t bytes) { write(address, bytes); }
}
