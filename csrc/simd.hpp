// Vectors of one instruction set, in GCC/Clang vector extensions: one register holds W points.
// Every name lives in a namespace of the instruction set, so the linker can never mix two of them.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "kernels.hpp"

namespace flowfast::FLOWFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTile = 8;  // kTile: components (or dimensions) per register tile
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTile = 4;
#else
constexpr int kVectorBytes = 16, kTile = 4;
#endif
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;  // x - alpha center is rounded twice
#endif
constexpr int P = 2;  // registers across a block: one broadcast mean feeds P products

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr float eps = 0x1p-23f, infinity = __builtin_inff();
  static constexpr float negligible = 24;  // exp(-24) is the square of the contract's smallest error
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr double eps = 0x1p-52, infinity = __builtin_inf();
  static constexpr double negligible = 47;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
using Index = std::remove_reference_t<decltype(std::declval<Int<T>&>()[0])>;
template <class T>
constexpr int W = kVectorBytes / int(sizeof(T));  // points per register
template <class T>
constexpr int B = P * W<T>;  // points per block

template <class T>
inline Vec<T>& at(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
inline const Vec<T>& at(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline Vec<T> all(T value) {
  return value - Vec<T>{};  // x - 0 is x, which 0 + x is not: one broadcast, straight from memory
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V magnitude(V a) {
  return a < 0 ? -a : a;
}

template <class I>
inline bool any(I mask) {
#if defined(__AVX512F__)  // vector extensions have no way to say this in one instruction
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  auto bits = mask[0];
  for (unsigned i = 1; i < sizeof(I) / sizeof(bits); ++i) bits |= mask[i];
  return bits != 0;
#endif
}
template <class V>
inline V square_root(V a) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
}
// *to = value past the caches where the instruction set can; `to` is aligned to a register, drain() follows the last
// one
template <class V>
inline void stream_to(V* to, const V& value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(value));
#else
  *to = value;
#endif
}
inline void drain() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class V>
inline auto sum_lanes(V a) {
  auto sum = a[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(sum); ++i) sum += a[i];
  return sum;
}
// The first `count` numbers of a register from or to any address; the others are zero or left alone. Whole registers
// have variables of their own: one that is indexed lives in memory.
template <class T>
inline Vec<T> load(const T* from, int64_t count = W<T>) {
  if (count >= W<T>) {
    Vec<T> whole;
    __builtin_memcpy(&whole, from, sizeof(whole));
    return whole;
  }
  Vec<T> value{};
  for (int64_t l = 0; l < count; ++l) value[l] = from[l];
  return value;
}
template <class T>
inline void store(Vec<T> whole, T* to, int64_t count = W<T>) {
  if (count >= W<T>) {
    __builtin_memcpy(to, &whole, sizeof(whole));
    return;
  }
  const Vec<T> value = whole;
  for (int64_t l = 0; l < count; ++l) to[l] = value[l];
}

template <class T>
inline T* take(Arena& arena, int64_t count) {
  return static_cast<T*>(take_bytes(arena, size_t(count) * sizeof(T)));
}

}  // namespace flowfast::FLOWFAST_ISA
