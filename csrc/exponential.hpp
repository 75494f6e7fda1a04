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

// Hides where a constant comes from, so that it stays in a register instead of being read at every turn of a loop.
template <class V>
inline V held(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

// The function 2^x with its constants. Make one before a loop.
template <class T>
struct Exp2 {
  static constexpr bool kSingle = sizeof(T) == 4;
  static constexpr int kMantissa = kSingle ? 23 : 52, kTerms = kSingle ? 6 : 11;
  Vec<T> shift =
      held(all(kSingle ? T(0x1.8p23) : T(0x1.8p52)));  // adding it rounds to an integer, left in the low bits
  Vec<T> power[kTerms];
  Exp2() {
    for (int i = 0; i < kTerms; ++i) power[i] = held(all(T(kSingle ? double(kPower32[i % 6]) : kPower64[i])));
  }
  // Where alive, kLowest <= x <= 0: error <= 1.5 ulp, 2^0 = 1, NaN stays NaN. Exactly 0 where not alive, for any x.
  Vec<T> operator()(Vec<T> x, Int<T> alive) const {
    const Vec<T> t = x + shift, r = x - (t - shift);
    Vec<T> p = power[0];
#pragma GCC unroll 16
    for (int i = 1; i < kTerms; ++i) p = p * r + power[i];
    p = p * r + T(1);
    using Bits = typename Simd<T>::Bits;
    const Bits bits = reinterpret_cast<const Bits&>(p) + (reinterpret_cast<const Bits&>(t) << kMantissa);
    return alive ? reinterpret_cast<const Vec<T>&>(bits) : Vec<T>{};
  }
  // x <= 0, exactly 0 below kLowest
  Vec<T> operator()(Vec<T> x) const { return (*this)(x, ~(x < kLowest<T>)); }
};

// 2^x[i] for i < n, any alignment: the same function for the tests.
template <class T>
void exp2_array(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W<T>) store(Exp2<T>()(load(x + i, n - i)), out + i, n - i);
}

}  // namespace flowfast::FLOWFAST_ISA
