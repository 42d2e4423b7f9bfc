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
  explicit Buffer(std::int64_t count) : Buffer(static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T), Bytes{}) {}

  T* data() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

 private:
  struct Bytes {};
  // Frees what was allocated, which may begin before the data.
  struct Free {
    void* memory;
    std::align_val_t alignment;  // 0 where it was the allocator's own
    void operator()(T*) const {
      if (alignment == std::align_val_t{0}) {
        ::operator delete(memory);
      } else {
        ::operator delete(memory, alignment);
      }
    }
  };

  static constexpr std::size_t kLine = 64, kHugePage = std::size_t{1} << 21;
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kSmall = 0;  // no room before and after the data in which a fault could hide
#else
  static constexpr std::size_t kSmall = std::size_t{1} << 16;
#endif

  // Small buffers are moved to a line by hand: glibc serves aligned memory past its caches, and joins all that is free
  // when it comes back, which took a fifth of a call on 1,000 elements.
  //
  // Blocked kernels visit a large buffer again and again in pieces of a cache's size.  Pages of 4 KB lie scattered in
  // physical memory and compete for the same sets of the second-level cache; one of 2 MB does not, and is filled in one
  // fault instead of 512.
  Buffer(std::size_t size, Bytes) {
    if (size < kSmall) {
      void* memory = ::operator new(size + kLine);
      void* data = memory;
      std::size_t space = size + kLine;
      data_ = {static_cast<T*>(std::align(kLine, size, data, space)), Free{memory, std::align_val_t{0}}};
      return;
    }
    const std::align_val_t alignment{size < kHugePage ? kLine : kHugePage};
    void* memory = ::operator new(size, alignment);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    data_ = {static_cast<T*>(memory), Free{memory, alignment}};
  }

  std::unique_ptr<T, Free> data_;
};

}  // namespace hpa
