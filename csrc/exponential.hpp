// exp of vectors. x = n ln2 + r with |r| <= ln2 / 2; exp(r) is a polynomial, 2^n goes into the exponent bits.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-87) : T(-708);  // exp is exactly zero below

// exp(x) where alive, kLowest <= x <= 0: relative error <= 2e-7 (float32), 4e-16 (float64); exp(0) = 1, NaN stays NaN.
// Exactly 0 where not alive, for any x.
inline Vec<float> exponential(Vec<float> x, Int<float> alive) {
  const float shift = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const Vec<float> t = x * 0x1.715476p0f + shift;
  const Vec<float> n = t - shift;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const Int<float> bits = (reinterpret_cast<const Int<float>&>(t) - (0x4b400000 - 127)) << 23;
  return alive ? p * reinterpret_cast<const Vec<float>&>(bits) : Vec<float>{};
}

inline Vec<double> exponential(Vec<double> x, Int<double> alive) {
  const double shift = 0x1.8p52;
  const Vec<double> t = x * 0x1.71547652b82fep0 + shift;
  const Vec<double> n = t - shift;
  const Vec<double> r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  constexpr double taylor[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0,  // to r^13:
                               1 / 362880.0,     1 / 40320.0,     1 / 5040.0,     1 / 720.0,      // remainder 4e-18
                               1 / 120.0,        1 / 24.0,        1 / 6.0,        1 / 2.0};
  Vec<double> p = all(taylor[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 12; ++i) p = p * r + taylor[i];
  p = (p * r) * r + r + 1.0;
  const Int<double> bits = (reinterpret_cast<const Int<double>&>(t) - (0x4338000000000000 - 1023)) << 52;
  return alive ? p * reinterpret_cast<const Vec<double>&>(bits) : Vec<double>{};
}

// exp(x), x <= 0, exactly 0 below kLowest
template <class V>
inline V exponential(V x) {
  return exponential(x, ~(x < kLowest<std::remove_reference_t<decltype(x[0])>>));
}

// exp(x[i]) for i < n, any alignment: the same function for the tests.
template <class T>
void exponential_array(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W<T>) store(exponential(load(x + i, n - i)), out + i, n - i);
}

}  // namespace flowfast::FLOWFAST_ISA
