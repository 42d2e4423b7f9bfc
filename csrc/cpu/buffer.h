// Scratch memory: aligned for vectors, uninitialised, freed with its scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hpa {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) : data_(allocate(bytes(count)), Free{alignment(bytes(count))}) {}

  T* data() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::size_t kLine = 64, kHugePage = std::size_t{1} << 21;

  static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T); }
  static std::align_val_t alignment(std::size_t size) { return std::align_val_t{size < kHugePage ? kLine : kHugePage}; }

  // Blocked kernels visit a large buffer again and again in pieces of a cache's size.  Pages of 4 KB lie scattered in
  // physical memory and compete for the same sets of the second-level cache; one of 2 MB does not, and is filled in one
  // fault instead of 512.
  static T* allocate(std::size_t size) {
    void* memory = ::operator new(size, alignment(size));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }

  struct Free {
    std::align_val_t alignment;
    void operator()(T* pointer) const { ::operator delete(pointer, alignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace hpa
