// Elements as they are stored, and as they are computed with.
//
// Storage types are what lies in memory; arithmetic is float, or double for float64.  Sixteen bytes are read by one
// 128-bit load and unpacked in registers.
#pragma once

#include <cstdint>

#include "hpa/tensor_view.h"
#include <machine.cuh>

namespace hpa::cuda {

struct Bfloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Bfloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Half value) { return half_to_float(value.bits); }

template <class Storage>
__device__ __forceinline__ Storage narrow(double value);
template <>
__device__ __forceinline__ double narrow<double>(double value) { return value; }
template <>
__device__ __forceinline__ float narrow<float>(double value) { return static_cast<float>(value); }
template <>
__device__ __forceinline__ Bfloat16 narrow<Bfloat16>(double value) {
  return {float_to_bfloat16(static_cast<float>(value))};
}
template <>
__device__ __forceinline__ Half narrow<Half>(double value) { return {float_to_half(static_cast<float>(value))}; }

template <class Storage>
__device__ __forceinline__ Storage narrow(float value);
template <>
__device__ __forceinline__ double narrow<double>(float value) { return static_cast<double>(value); }
template <>
__device__ __forceinline__ float narrow<float>(float value) { return value; }
template <>
__device__ __forceinline__ Bfloat16 narrow<Bfloat16>(float value) { return {float_to_bfloat16(value)}; }
template <>
__device__ __forceinline__ Half narrow<Half>(float value) { return {float_to_half(value)}; }

// `Count` elements that lie side by side: moved by one instruction where they fill 16 bytes.
template <class Storage, int Count>
struct alignas(sizeof(Storage) * Count) Pack {
  Storage at[Count];
};

template <class Storage>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(Storage));

template <class Storage, int Count>
__device__ __forceinline__ Pack<Storage, Count> load_pack(const Storage* from) {
  Pack<Storage, Count> pack;
  if constexpr (sizeof(pack) == 16) {
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(from);
  } else {
    static_assert(Count == 1);
    pack.at[0] = *from;
  }
  return pack;
}

template <class Storage, int Count>
__device__ __forceinline__ void store_pack(Storage* to, const Pack<Storage, Count>& pack) {
  if constexpr (sizeof(pack) == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
  } else {
    *to = pack.at[0];
  }
}

// One element of a dtype known at run time; the branch is the same for all threads of a block.
template <class T>
__device__ __forceinline__ T load_element(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[index]);
    case DType::f64: return static_cast<T>(static_cast<const double*>(data)[index]);
    case DType::bf16: return static_cast<T>(widen(static_cast<const Bfloat16*>(data)[index]));
    case DType::f16: return static_cast<T>(widen(static_cast<const Half*>(data)[index]));
    default: return T(0);
  }
}

template <class T>
__device__ __forceinline__ void store_element(void* data, DType dtype, std::int64_t index, T value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(data)[index] = static_cast<double>(value); break;
    case DType::bf16: static_cast<Bfloat16*>(data)[index] = narrow<Bfloat16>(value); break;
    case DType::f16: static_cast<Half*>(data)[index] = narrow<Half>(value); break;
    default: break;
  }
}

// Four elements side by side; `data + index` is aligned to four elements (16 bytes for float32 and float64).
template <class T>
__device__ __forceinline__ void load_four(const void* data, DType dtype, std::int64_t index, T (&values)[4]) {
  if (dtype == DType::f32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
    values[0] = static_cast<T>(v.x), values[1] = static_cast<T>(v.y);
    values[2] = static_cast<T>(v.z), values[3] = static_cast<T>(v.w);
  } else if (dtype == DType::f64) {
    const auto* pairs = reinterpret_cast<const double2*>(static_cast<const double*>(data) + index);
    const double2 low = pairs[0], high = pairs[1];
    values[0] = static_cast<T>(low.x), values[1] = static_cast<T>(low.y);
    values[2] = static_cast<T>(high.x), values[3] = static_cast<T>(high.y);
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(data) + index);
    const std::uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto bits = static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)));
      values[i] = static_cast<T>(dtype == DType::bf16 ? widen(Bfloat16{bits}) : widen(Half{bits}));
    }
  }
}

template <class T>
__device__ __forceinline__ void store_four(void* data, DType dtype, std::int64_t index, const T (&values)[4]) {
  if (dtype == DType::f32) {
    store_whole(static_cast<float*>(data) + index,
                make_float4(static_cast<float>(values[0]), static_cast<float>(values[1]), static_cast<float>(values[2]),
                            static_cast<float>(values[3])));
  } else if (dtype == DType::f64) {
    auto* to = static_cast<double*>(data) + index;
    store_whole(to, make_double2(static_cast<double>(values[0]), static_cast<double>(values[1])));
    store_whole(to + 2, make_double2(static_cast<double>(values[2]), static_cast<double>(values[3])));
  } else {
    std::uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t bits = dtype == DType::bf16 ? narrow<Bfloat16>(values[i]).bits : narrow<Half>(values[i]).bits;
      words[i / 2] |= bits << (16 * (i % 2));
    }
    store_whole(static_cast<std::uint16_t*>(data) + index, make_uint2(words[0], words[1]));
  }
}

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
void with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: body(float{}); break;
    case DType::f64: body(double{}); break;
    case DType::bf16: body(Bfloat16{}); break;
    case DType::f16: body(Half{}); break;
    default: break;
  }
}

template <class Storage>
using Arithmetic = decltype(widen(Storage{}));

}  // namespace hpa::cuda
