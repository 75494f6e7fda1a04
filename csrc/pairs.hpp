// Products of the components with each other: Gram matrix and diameter. Nothing of size k * k but the Gram matrix
// itself.
#pragma once
#include "posterior.hpp"

namespace flowfast::FLOWFAST_ISA {

// lanes (stride, B) <- centred means first .. first + B - 1, the last one repeated
template <class T>
void means_to_lanes(const Components<T>& c, int64_t first, T* lanes) {
  const T* rows[B<T>];
  for (int l = 0; l < B<T>; ++l) rows[l] = c.means + (first + l < c.k ? first + l : c.k - 1) * c.d;
  rows_to_lanes(rows, c.d, lanes, [&](int, int64_t j, Vec<T> row) { return row - at(c.center + j); });
}

// gram (k_pad, k_pad) = rows . rows, for the rows this worker is given; zero in the padding
template <class T>
void gram(const Components<T>& c, T* gram, int64_t k_pad, Work& work, Arena& arena) {
  T *points = take<T>(arena, c.stride * B<T>), *dots = take<T>(arena, kPanel<T> * B<T>);
  Panels<T> panels(c, arena);
  int64_t begin, end;
  while (next_rows(work, begin, end))
    for (; begin < end; begin += B<T>) {
      means_to_lanes(c, begin, points);
      for (int64_t first = 0; first < c.k; first += kPanel<T>) {
        const Panel<T> panel = panels.get(first);
        project(panel, c.d, points, dots, [](int64_t, auto&) {});
        for (int64_t lane = 0; lane < B<T> && begin + lane < k_pad; ++lane)
          for (int64_t i = 0; i < panel.count; ++i)
            gram[(begin + lane) * k_pad + first + i] = begin + lane < c.k ? dots[i * B<T> + lane] : T(0);
      }
    }
}

// Largest |m_i - m_j| over the rows i this worker is given and j >= i. The pair is found by centred products, its
// distance taken by differences: relative error <= 2 eps plus the rounding of the products, (error_constant(d) + 2) u,
// where two pairs tie.
template <class T>
double diameter(const Components<T>& c, Work& work, Arena& arena) {
  struct Farthest {
    Vec<T> value[P];
    Int<T> partner[P];
  };
  Panels<T> panels(c, arena);
  const int64_t group = c.group, wide = c.stride * B<T>;
  T *points = take<T>(arena, group * wide), *dots = take<T>(arena, kPanel<T> * B<T>);
  Farthest* farthest = take<Farthest>(arena, group);
  double largest = 0;
  int64_t begin, end;
  while (next_rows(work, begin, end))
    for (; begin < end; begin += group * B<T>) {
      int64_t used = 0;
      for (; used < group && begin + used * B<T> < end; ++used) {
        means_to_lanes(c, begin + used * B<T>, points + used * wide);
        for (int p = 0; p < P; ++p) farthest[used] = {};
        for (int p = 0; p < P; ++p) farthest[used].value[p] = all(-Simd<T>::infinity);
      }
      for (int64_t first = begin / kPanel<T> * kPanel<T>; first < c.k; first += kPanel<T>) {
        const Panel<T> panel = panels.get(first);
        for (int64_t g = 0; g < used; ++g)  // |m_i - m_k|^2 / 2 less |m_i|^2 / 2, which is the same for every k
          project(
              panel, c.d, points + g * wide, dots,
              [&](int64_t k, auto& tile) {
                Farthest now = farthest[g];
#pragma GCC unroll 16
                for (int t = 0; t < int(sizeof(tile) / sizeof(tile[0])); ++t) {
                  const Vec<T> half_norm = all(panel.half_norms[k + t]);
                  const Int<T> here = Int<T>{} + Index<T>(first + k + t < c.k ? first + k + t : -1);
                  for (int p = 0; p < P; ++p) {
                    const Vec<T> value = half_norm - tile[t][p];
                    const Int<T> above = (value > now.value[p]) & (here >= 0);
                    now.partner[p] = above ? here : now.partner[p];
                    now.value[p] = above ? value : now.value[p];
                  }
                }
                farthest[g] = now;
              },
              panels.ahead(first, g, used));
      }
      for (int64_t i = begin; i < c.k && i < begin + used * B<T>; ++i) {
        const int lane = int((i - begin) % B<T>);
        const T* a = c.means + i * c.d;
        const T* b = c.means + farthest[(i - begin) / B<T>].partner[lane / W<T>][lane % W<T>] * c.d;
        const double square = squared_distance(a, b, 1.0, c.d);
        if (square > largest || square != square) largest = square;
      }
    }
  return __builtin_sqrt(largest);
}

}  // namespace flowfast::FLOWFAST_ISA
