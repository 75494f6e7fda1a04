// Products of points with means where both lie in rows, registers along the columns: what the span form needs on the
// way in and out. Means lie in chunks of kChunk columns, (count, width) each, count padded to kRows.
#pragma once
#include "panels.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kTogether = 4, kAcross = kTile / 2;  // points of a tile; means or registers of columns beside them

// sums (count, kTogether, W) += points (kTogether, kChunk) * means (count, width), column by column
template <class T>
void add_products(const T* means, int64_t count, const T* points, int64_t width, T* sums) {
  for (int64_t k = 0; k < count; k += kAcross, sums += kAcross * kTogether * W<T>) {
    Vec<T> acc[kAcross][kTogether];
    for (int i = 0; i < kAcross * kTogether; ++i) acc[i / kTogether][i % kTogether] = at(sums + i * W<T>);
    for (int64_t j = 0; j < width; j += W<T>)
      for (int m = 0; m < kAcross; ++m) {
        const Vec<T> mean = at(means + (k + m) * width + j);
        for (int i = 0; i < kTogether; ++i) acc[m][i] += mean * at(points + i * kChunk + j);
      }
    for (int i = 0; i < kAcross * kTogether; ++i) at(sums + i * W<T>) = acc[i / kTogether][i % kTogether];
  }
}

// dots (count, B), columns 0 .. kTogether - 1 <- the sums' sums
template <class T>
void sum_columns(const T* sums, int64_t count, T* dots) {
  for (int64_t i = 0; i < count * kTogether; i += W<T>) {
    Vec<T> v[W<T>], total{};
    for (int l = 0; l < W<T>; ++l) v[l] = at(sums + (i + l) * W<T>);
    transpose<T>(v);
    for (int l = 0; l < W<T>; ++l) total += v[l];
    for (int l = 0; l < W<T>; ++l) dots[(i + l) / kTogether * B<T> + (i + l) % kTogether] = total[l];
  }
}

// tile (kTogether, Across) <- sum_k weights (count, B) * means (count, width), of points 0 .. kTogether - 1
template <int Across, class T>
inline void weighted_means(const T* means, int64_t count, int64_t width, const T* weights, Vec<T> (*tile)[Across]) {
  Vec<T> acc[kTogether][Across] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kTogether; ++i) {
      const Vec<T> weight = all(weights[k * B<T> + i]);
      for (int c = 0; c < Across; ++c) acc[i][c] += weight * at(means + k * width + c * W<T>);
    }
  for (int i = 0; i < kTogether * Across; ++i) tile[i / Across][i % Across] = acc[i / Across][i % Across];
}

}  // namespace flowfast::FLOWFAST_ISA
