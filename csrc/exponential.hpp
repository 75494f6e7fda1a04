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

#if defined(__AVX512F__)  // the nearest integer, p 2^n: one instruction each
inline Vec<float> nearest(Vec<float> x) { return _mm512_maskz_roundscale_ps(__mmask16(-1), x, 8); }
inline Vec<double> nearest(Vec<double> x) { return _mm512_maskz_roundscale_pd(__mmask8(-1), x, 8); }
inline Vec<float> times_power(Vec<float> p, Vec<float> n) { return _mm512_maskz_scalef_ps(__mmask16(-1), p, n); }
inline Vec<double> times_power(Vec<double> p, Vec<double> n) { return _mm512_maskz_scalef_pd(__mmask8(-1), p, n); }
#endif

// The function 2^x with its constants. Make one before a loop.
template <class T>
struct Exp2 {
  using Bits = typename Simd<T>::Bits;
  static constexpr bool kSingle = sizeof(T) == 4;
  static constexpr int kMantissa = kSingle ? 23 : 52, kTerms = kSingle ? 6 : 11;
  Vec<T> shift =
      held(all(kSingle ? T(0x1.8p23) : T(0x1.8p52)));  // adding it rounds to an integer, left in the low bits
  Vec<T> power[kTerms];
  Exp2() {
    for (int i = 0; i < kTerms; ++i) power[i] = held(all(T(kSingle ? double(kPower32[i % 6]) : kPower64[i])));
  }
  // x <- 2^x where alive, kLowest <= x <= 0: error <= 1.5 ulp, 2^0 = 1, NaN stays NaN; exactly 0 where not alive, for
  // any x. N registers in step, so that the processor has N chains to work on.
  template <int N>
  void each(Vec<T> (&x)[N], const Int<T> (&alive)[N]) const {
    Vec<T> n[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#if defined(__AVX512F__)
      n[i] = nearest(x[i]), x[i] -= n[i], p[i] = power[0];
#else
      n[i] = x[i] + shift, x[i] -= n[i] - shift, p[i] = power[0];
#endif
    }
#pragma GCC unroll 16
    for (int term = 1; term < kTerms; ++term)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + power[term];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      p[i] = p[i] * x[i] + T(1);
#if defined(__AVX512F__)
      p[i] = times_power(p[i], n[i]);
#else
      reinterpret_cast<Bits&>(p[i]) += reinterpret_cast<const Bits&>(n[i]) << kMantissa;
#endif
      x[i] = alive[i] ? p[i] : Vec<T>{};
    }
  }
  Vec<T> operator()(Vec<T> x, Int<T> alive) const {
    Vec<T> one[1] = {x};
    const Int<T> mask[1] = {alive};
    return each(one, mask), one[0];
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
