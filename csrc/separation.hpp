// Logit differences without cancellation: |x - a mk|^2 - |x - a ma|^2 = -2 a (mk - ma) . (x - a (mk + ma) / 2).
// float32 is evaluated in double; float64 in double-double (a value hi + lo, |lo| <= ulp(hi) / 2).
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

struct Wide {
  double hi, lo;
};

// Hides a product from the compiler, which would otherwise fuse it and void the error terms below.
inline double opaque(double value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  volatile double kept = value;
  value = kept;
#endif
  return value;
}

inline Wide exact_sum(double a, double b) {
  const double sum = opaque(a + b), part = opaque(sum - a);
  return {sum, (a - (sum - part)) + (b - part)};
}

inline Wide exact_product(double a, double b) {
  const double product = opaque(a * b);
  return {product, __builtin_fma(a, b, -product)};
}

// sum over j < d of term(j), in eight partial sums
template <class Term>
inline double sum_terms(int64_t d, const Term& term) {
  double part[8] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8)
    for (int l = 0; l < 8; ++l) part[l] += term(j + l);
  for (; j < d; ++j) part[j % 8] += term(j);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// sum_j (mk - ma)_j (x - alpha (mk + ma) / 2)_j: error <= d 2^-52 |mk - ma| |x - alpha (mk + ma) / 2| plus
// 2^-52 |x| |mk - ma|
inline double separation(const float* mk, const float* ma, const float* x, double alpha, int64_t d) {
  return sum_terms(d, [=](int64_t j) {
    return (double(mk[j]) - double(ma[j])) * (double(x[j]) - 0.5 * alpha * (double(mk[j]) + double(ma[j])));
  });
}

// The same for float64, error about d 2^-104 |mk - ma| |x|.
inline double separation(const double* mk, const double* ma, const double* x, double alpha, int64_t d) {
  Wide sum{0, 0};
  for (int64_t j = 0; j < d; ++j) {
    const Wide gap = exact_sum(mk[j], -ma[j]), both = exact_sum(mk[j], ma[j]);
    const Wide half = exact_product(both.hi, 0.5 * alpha);
    const Wide side = exact_sum(x[j], -half.hi);
    const double side_lo = side.lo - (half.lo + both.lo * 0.5 * alpha);
    const Wide term = exact_product(gap.hi, side.hi);
    const Wide next = exact_sum(sum.hi, term.hi);
    sum = {next.hi, sum.lo + next.lo + term.lo + (gap.hi * side_lo + gap.lo * side.hi)};
  }
  return sum.hi + sum.lo;
}

template <class T>
inline bool is_finite(const T* x, int64_t d) {
  return sum_terms(d, [=](int64_t j) { return double(x[j] - x[j]); }) == 0;
}

// |x - alpha m|^2, every difference rounded once: relative error <= (d + 3) 2^-53
template <class T>
inline double squared_distance(const T* x, const T* m, double alpha, int64_t d) {
  return sum_terms(d, [=](int64_t j) {
    const double gap = __builtin_fma(-alpha, double(m[j]), double(x[j]));
    return gap * gap;
  });
}

}  // namespace flowfast::FLOWFAST_ISA
