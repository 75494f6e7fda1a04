// 2^x of vectors: x = n + r with n an integer and |r| <= 1 / 2; 2^r is a polynomial, n is added to its exponent bits.
// Logits are kept in units of ln 2, so that no other exponential is needed.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr double kLog2e = 1.4426950408889634;  // logits are multiplied by it

// Minimax of (2^r - 1) / r on [-1/2, 1/2], highest power first: relative error of 1 + r p(r) 3e-9 and 2e-17.
inline constexpr float kPower32[] = {1.55946781613e-4f, 1.34066439024e-3f, 9.61769297299e-3f,
                                     5.55031055101e-2f, 2.40226527829e-1f, 6.93147214968e-1f};
inline constexpr double kPower64[] = {0x1.c0638527edf34p-32, 0x1.e605f979c7a5dp-28, 0x1.b54167a0b9061p-24,
                                      0x1.62bfd49ed0adfp-20, 0x1.ffcbee3b0af8cp-17, 0x1.4309130961163p-13,
                                      0x1.5d87fe7bbbe07p-10, 0x1.3b2ab6fba1e1cp-7,  0x1.c6b08d7048f31p-5,
                                      0x1.ebfbdff82c598p-3,  0x1.62e42fefa39f3p-1};

template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-125) : T(-1021);  // 2^x is exactly zero below

// 2^x where alive, kLowest <= x <= 0: error <= 1.5 ulp, 2^0 = 1, NaN stays NaN. Exactly 0 where not alive, for any x.
template <class T>
inline Vec<T> exp2(Vec<T> x, Int<T> alive) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52, terms = single ? 6 : 11;
  const T shift = single ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to an integer, left in the low bits
  const Vec<T> t = x + shift, r = x - (t - shift);
  const auto& power = [] {
    if constexpr (single)
      return kPower32;
    else
      return kPower64;
  }();
  Vec<T> p = all(T(power[0]));
#pragma GCC unroll 16
  for (int i = 1; i < terms; ++i) p = p * r + T(power[i]);
  p = p * r + T(1);
  const Int<T> bits = reinterpret_cast<const Int<T>&>(p) + (reinterpret_cast<const Int<T>&>(t) << mantissa);
  return alive ? reinterpret_cast<const Vec<T>&>(bits) : Vec<T>{};
}

// 2^x, x <= 0, exactly 0 below kLowest
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  return exp2<T>(x, ~(x < kLowest<T>));
}

// 2^x[i] for i < n, any alignment: the same function for the tests.
template <class T>
void exp2_array(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W<T>) store(exp2<T>(load(x + i, n - i)), out + i, n - i);
}

}  // namespace flowfast::FLOWFAST_ISA
