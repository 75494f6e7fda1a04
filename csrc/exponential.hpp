// exp of vectors. x = n ln2 + r with |r| <= ln2 / 2; exp(r) is a polynomial, 2^n goes into the exponent bits.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

// exp(x), x <= 0, float32: relative error <= 2e-7. Below -87 (and at -inf) exactly 0; exp(0) = 1; NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
  const float shift = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const Int<float> tiny = x < -87.0f;
  x = tiny ? all(-87.0f) : x;
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
  return tiny ? Vec<float>{} : p * reinterpret_cast<const Vec<float>&>(bits);
}

// exp(x), x <= 0, float64: relative error <= 4e-16. Below -708 (and at -inf) exactly 0; exp(0) = 1; NaN stays NaN.
inline Vec<double> exponential(Vec<double> x) {
  const double shift = 0x1.8p52;
  const Int<double> tiny = x < -708.0;
  x = tiny ? all(-708.0) : x;
  const Vec<double> t = x * 0x1.71547652b82fep0 + shift;
  const Vec<double> n = t - shift;
  const Vec<double> r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;  // Taylor to r^13: remainder 4e-18
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.0;
  const Int<double> bits = (reinterpret_cast<const Int<double>&>(t) - (0x4338000000000000 - 1023)) << 52;
  return tiny ? Vec<double>{} : p * reinterpret_cast<const Vec<double>&>(bits);
}

// exp(x[i]) for i < n, any alignment: the same function for the tests.
template <class T>
void exponential_array(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W<T>) {
    Vec<T> v{};
    const int count = int(n - i < W<T> ? n - i : W<T>);
    for (int lane = 0; lane < count; ++lane) v[lane] = x[i + lane];
    v = exponential(v);
    for (int lane = 0; lane < count; ++lane) out[i + lane] = v[lane];
  }
}

}  // namespace flowfast::FLOWFAST_ISA
