// Products of the components with each other: Gram matrix and diameter. Nothing of size k * k but the Gram matrix
// itself.
#pragma once
#include "products.hpp"
#include "separation.hpp"

namespace flowfast::FLOWFAST_ISA {

// lanes (d, B): rows first .. first + B - 1, zero beyond k_pad
template <class T>
void rows_as_points(const Components<T>& c, int64_t first, T* lanes) {
  for (int lane = 0; lane < B<T>; ++lane)
    for (int64_t j = 0; j < c.d; ++j)
      lanes[j * B<T> + lane] = first + lane < c.k_pad ? c.rows[(first + lane) * c.stride + j] : T(0);
}

// gram (k_pad, gram_stride) = rows . rows, for the rows this worker is given
template <class T>
void gram(const Components<T>& c, T* gram, int64_t gram_stride, Work& work, Arena& arena) {
  T* points = take<T>(arena, c.d * B<T>);
  T* dots = take<T>(arena, c.k_pad * B<T>);
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      rows_as_points(c, begin, points);
      project(c.rows, c.stride, c.k_pad, points, c.d, dots);
      for (int64_t lane = 0; lane < B<T> && begin + lane < c.k_pad; ++lane)
        for (int64_t k = 0; k < c.k_pad; ++k) gram[(begin + lane) * gram_stride + k] = dots[k * B<T> + lane];
    }
  }
}

// Largest |m_i - m_j| over the rows i this worker is given and j >= i. The pair is found by centred products, its
// distance taken by differences: relative error <= 2 eps plus the rounding of the products, (error_constant(d) + 2) u,
// where two pairs tie.
template <class T>
double diameter(const Components<T>& c, Work& work, Arena& arena) {
  T* points = take<T>(arena, c.d * B<T>);
  T* dots = take<T>(arena, 64 * B<T>);
  double largest = 0;
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      rows_as_points(c, begin, points);
      Vec<T> best[P] = {};
      Int<T> partner[P] = {};
      for (int64_t first = begin; first < c.k_pad; first += 64) {
        const int64_t padded = c.k_pad - first < 64 ? c.k_pad - first : 64;
        project(c.rows + first * c.stride, c.stride, padded, points, c.d, dots);
        for (int64_t k = 0; k < padded && first + k < c.k; ++k)
          for (int p = 0; p < P; ++p) {  // |m_i - m_k|^2 / 2 less |m_i|^2 / 2, which is the same for every k
            const Vec<T> value = c.half_norms[first + k] - at(dots + k * B<T> + p * W<T>) + T(c.radius * c.radius);
            const Int<T> above = value > best[p];
            best[p] = above ? value : best[p];
            partner[p] = above ? Int<T>{} + decltype(partner[p][0] + 0)(first + k) : partner[p];
          }
      }
      for (int64_t lane = 0; lane < B<T> && begin + lane < c.k; ++lane) {
        const T* a = c.means + c.index[begin + lane] * c.d;
        const T* b = c.means + c.index[partner[lane / W<T>][lane % W<T>]] * c.d;
        const double square = 2 * separation(a, b, a, 1.0, c.d);
        if (square > largest || square != square) largest = square;
      }
    }
  }
  return __builtin_sqrt(largest);
}

}  // namespace flowfast::FLOWFAST_ISA
