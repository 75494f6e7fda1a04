// Rows to lanes and back: an array "(width, B)" holds point i in column i, so that a register holds W points.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

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

// W registers transposed in place
template <class T, int S = 1>
inline void transpose(Vec<T>* v) {
  if constexpr (S < W<T>) {
    for (int i = 0; i < W<T>; ++i)
      if (!(i & S)) exchange<T, S>(v[i], v[i + S], std::make_integer_sequence<int, W<T>>{});
    transpose<T, 2 * S>(v);
  }
}

// lanes (width padded to kColumns, B) <- value(lane, j, rows[lane][j .. j + W - 1]) for columns j < width
template <class T, class Value>
inline void rows_to_lanes(const T* const* rows, int64_t width, T* lanes, const Value& value) {
  for (int start = 0; start < B<T>; start += W<T>)
    for (int64_t j = 0; j < (width + kColumns - 1) / kColumns * kColumns; j += W<T>) {
      Vec<T> v[W<T>];
      if (j + W<T> <= width)
        for (int i = 0; i < W<T>; ++i) v[i] = value(start + i, j, load(rows[start + i] + j));
      else
        for (int i = 0; i < W<T>; ++i) v[i] = value(start + i, j, load(rows[start + i] + j, width - j));
      transpose<T>(v);
      for (int i = 0; i < W<T>; ++i) at(lanes + (j + i) * B<T> + start) = v[i];
    }
}

// rows[lane][j] <- lanes (width, B), j < width, lane < count; past the caches where the rows are whole registers
template <class T>
inline void lanes_to_rows(const T* lanes, int64_t width, int64_t count, T* const* rows, bool past_caches) {
  for (int64_t start = 0; start < count; start += W<T>)
    for (int64_t j = 0; j < width; j += W<T>) {
      Vec<T> v[W<T>];
      for (int i = 0; i < W<T>; ++i) v[i] = at(lanes + (j + i) * B<T> + start);
      transpose<T>(v);
      if (start + W<T> <= count && j + W<T> <= width) {
        for (int i = 0; i < W<T>; ++i)
          past_caches ? stream_to(&at(rows[start + i] + j), v[i]) : store(v[i], rows[start + i] + j);
      } else {
        for (int64_t i = 0; i < W<T> && start + i < count; ++i) store(v[i], rows[start + i] + j, width - j);
      }
    }
}

}  // namespace flowfast::FLOWFAST_ISA
