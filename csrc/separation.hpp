// Logit differences without cancellation, in arithmetic of twice the precision.
#pragma once
#include <cfloat>

#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

#if LDBL_MANT_DIG == 113
using Quad = long double;
#else
using Quad = __float128;
#endif

// sum over j < d of term(j), in eight partial sums
template <class Sum, class Term>
inline Sum sum_terms(int64_t d, const Term& term) {
  Sum part[8] = {};
  int64_t j = 0;
  for (; j + 8 <= d; j += 8)
    for (int l = 0; l < 8; ++l) part[l] += term(j + l);
  for (; j < d; ++j) part[j % 8] += term(j);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// (|x - alpha ma|^2 - |x - alpha mk|^2) / 2 alpha = sum_j (mk - ma)_j (x - alpha (mk + ma) / 2)_j
template <class T>
inline double separation(const T* mk, const T* ma, const T* x, double alpha, int64_t d) {
  using Wide = std::conditional_t<sizeof(T) == 4, double, Quad>;
  const Wide half = Wide(alpha) / 2;
  return double(sum_terms<Wide>(d, [=](int64_t j) {
    const Wide k = mk[j], a = ma[j];
    return (k - a) * (Wide(x[j]) - half * (k + a));
  }));
}

// |x - alpha m|^2, every difference rounded once: relative error <= (d + 3) 2^-53
template <class T>
inline double squared_distance(const T* x, const T* m, double alpha, int64_t d) {
  return sum_terms<double>(d, [=](int64_t j) {
    const double gap = __builtin_fma(-alpha, double(m[j]), double(x[j]));
    return gap * gap;
  });
}

template <class T>
inline bool is_finite(const T* x, int64_t d) {
  Int<T> broken{};
  for (int64_t j = 0; j < d; j += W<T>) broken |= load(x + j, d - j) - load(x + j, d - j) != 0;
  return !any(broken);
}

}  // namespace flowfast::FLOWFAST_ISA
