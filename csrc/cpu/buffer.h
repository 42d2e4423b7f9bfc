// Scratch memory: aligned for vectors, uninitialised, freed with its scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace hpa {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) : data_(static_cast<T*>(::operator new(bytes(count), kAlignment))) {}

  T* data() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T); }
  struct Free {
    void operator()(T* pointer) const { ::operator delete(pointer, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace hpa
