// The two hot loops, and rows to lanes and back. Points lie across registers: an array "(d, B)" holds point i in column
// i.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int64_t kChunk = 64;  // a dot product is a sum of partial sums of this length (error_constant relies on it)

// dots (count, B) = rows (count, d) . z (d, B); count a multiple of 4. Rounding: error_constant(d) u |row| |z|.
template <class T, int Tile = kTile>
void project(const T* rows, int64_t stride, int64_t count, const T* z, int64_t d, T* dots) {
  if (Tile > 4 && count % Tile) {
    const int64_t whole = count / Tile * Tile;
    project<T, 4>(rows + whole * stride, stride, count - whole, z, d, dots + whole * B<T>);
    count = whole;
  }
  for (int64_t k = 0; k < count; k += Tile) {
    for (int64_t start = 0; start < d; start += kChunk) {
      const int64_t stop = start + kChunk < d ? start + kChunk : d;
      const T* row = rows + k * stride;
      Vec<T> acc[Tile][P] = {};
      for (int64_t j = start; j < stop; ++j) {
        Vec<T> point[P];
        for (int p = 0; p < P; ++p) point[p] = at(z + j * B<T> + p * W<T>);
#pragma GCC unroll 8
        for (int t = 0; t < Tile; ++t) {
          const Vec<T> mean = all(row[t * stride + j]);
          for (int p = 0; p < P; ++p) acc[t][p] += mean * point[p];
        }
      }
      for (int t = 0; t < Tile; ++t)
        for (int p = 0; p < P; ++p) {
          Vec<T>& dot = at(dots + (k + t) * B<T> + p * W<T>);
          dot = start == 0 ? acc[t][p] : dot + acc[t][p];
        }
    }
  }
}

// sum (columns, B) += sum over the listed components of weights (., B) * rows (., columns), or = where fresh; columns a
// multiple of kTile.
template <class T>
void accumulate(const T* rows, int64_t stride, const int* live, int n_live, const T* weights, int64_t columns, T* sum,
                bool fresh = false) {
  for (int64_t j = 0; j < columns; j += kTile) {
    Vec<T> acc[kTile][P];
    for (int t = 0; t < kTile; ++t)
      for (int p = 0; p < P; ++p) acc[t][p] = fresh ? Vec<T>{} : at(sum + (j + t) * B<T> + p * W<T>);
    for (int l = 0; l < n_live; ++l) {
      const T* row = rows + live[l] * stride + j;
      const T* weight = weights + int64_t(live[l]) * B<T>;
      Vec<T> w[P];
      for (int p = 0; p < P; ++p) w[p] = at(weight + p * W<T>);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Vec<T> mean = all(row[t]);
        for (int p = 0; p < P; ++p) acc[t][p] += mean * w[p];
      }
    }
    for (int t = 0; t < kTile; ++t)
      for (int p = 0; p < P; ++p) at(sum + (j + t) * B<T> + p * W<T>) = acc[t][p];
  }
}

// a . b over padded, aligned rows of one point.
template <class T>
inline T row_dot(const T* a, const T* b, int64_t stride) {
  Vec<T> sum{};
  for (int64_t j = 0; j < stride; j += W<T>) sum += at(a + j) * at(b + j);
  return sum_lanes(sum);
}

// a and b with their off-diagonal squares of S x S exchanged
template <class T, int S, int... I>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  const Vec<T> low = a, high = b;
#if defined(__clang__)
  a = __builtin_shufflevector(low, high, (I & S ? W<T> + I - S : I)...);
  b = __builtin_shufflevector(low, high, (I & S ? W<T> + I : I + S)...);
#else
  a = __builtin_shuffle(low, high, Int<T>{(I & S ? W<T> + I - S : I)...});
  b = __builtin_shuffle(low, high, Int<T>{(I & S ? W<T> + I : I + S)...});
#endif
}

template <class T, int S>
inline void transpose_steps(Vec<T>* v) {
  if constexpr (S < W<T>) {
    for (int i = 0; i < W<T>; ++i)
      if (!(i & S)) exchange<T, S>(v[i], v[i + S], std::make_integer_sequence<int, W<T>>{});
    transpose_steps<T, 2 * S>(v);
  }
}

// to (W, .) = transpose of from (W, .), rows at the given strides
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vec<T> v[W<T>];
  for (int i = 0; i < W<T>; ++i) v[i] = at(from + i * from_stride);
  transpose_steps<T, 1>(v);
  for (int i = 0; i < W<T>; ++i) at(to + i * to_stride) = v[i];
}

}  // namespace flowfast::FLOWFAST_ISA
