// Rows to lanes and back: an array "(width, B)" holds point i in column i, so that a register holds W points.
#pragma once
#include "simd.hpp"

namespace flowfast::FLOWFAST_ISA {

// a, b <- numbers of both, chosen by index: i from a, W + i from b
template <class T, int... I>
inline Vec<T> pick(const Vec<T>& a, const Vec<T>& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Int<T>{I...});
#endif
}

// Within 128 bits: runs of S numbers of a and b in turn, a <- from the first halves, b <- from the second.
template <class T, int S, int... I>
inline void interleave(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int lane = 16 / sizeof(T);
  const Vec<T> c = a, d = b;
  a = pick<T>(c, d,
              std::integer_sequence<int, (I / lane * lane + I % lane / S / 2 * S + I % S + I / S % 2 * W<T>)...>{});
  b = pick<T>(
      c, d,
      std::integer_sequence<int, (I / lane * lane + lane / 2 + I % lane / S / 2 * S + I % S + I / S % 2 * W<T>)...>{});
}

// Whole 128 bits: a <- the even ones of a and of b, b <- the odd ones.
template <class T, int... I>
inline void separate(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int lane = 16 / sizeof(T), half = W<T> / 2;
  const Vec<T> c = a, d = b;
  a = pick<T>(c, d, std::integer_sequence<int, (I % half / lane * 2 * lane + I % lane + I / half * W<T>)...>{});
  b = pick<T>(c, d, std::integer_sequence<int, (I % half / lane * 2 * lane + lane + I % lane + I / half * W<T>)...>{});
}

// W registers transposed in place: first the squares inside 128 bits, then the 128 bits
template <class T>
inline void transpose(Vec<T>* v) {
  constexpr int lane = 16 / sizeof(T), lanes = W<T> / lane;
  constexpr auto all = std::make_integer_sequence<int, W<T>>{};
  for (int i = 0; i < W<T>; i += 2) interleave<T, 1>(v[i], v[i + 1], all);
  for (int i = 0; lane == 4 && i < W<T>; i += 4) {
    std::swap(v[i + 1], v[i + 2]);
    interleave<T, 2>(v[i], v[i + 1], all), interleave<T, 2>(v[i + 2], v[i + 3], all);
  }
  for (int i = 0; i < lane; ++i) {
    Vec<T>*a = v + i, *b = a + lane, *c = b + lane, *d = c + lane;
    if (lanes > 1) separate<T>(*a, *b, all);
    if (lanes < 4) continue;
    separate<T>(*c, *d, all), std::swap(*b, *c);
    separate<T>(*a, *b, all), separate<T>(*c, *d, all), std::swap(*b, *c);
  }
}

// row - (alpha + rest) center (W,): error u |result|, by fused products where there are any
template <class T>
inline Vec<T> centred_row(const T* center, T alpha, T rest, Vec<T> row) {
  if constexpr (kFused) return (row - alpha * at(center)) - rest * at(center);
  for (int l = 0; l < W<T>; ++l) row[l] = T(double(row[l]) - (double(alpha) + double(rest)) * double(center[l]));
  return row;
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
inline void lanes_to_rows(const T* lanes, int64_t width, int64_t count, T* const* rows, bool past_caches = false) {
  for (int64_t start = 0; start < count; start += W<T>)
    for (int64_t j = 0; j < width; j += W<T>) {
      Vec<T> v[W<T>];
      for (int i = 0; i < W<T>; ++i) v[i] = at(lanes + (j + i) * B<T> + start);
      transpose<T>(v);
      T* const* to = rows + start;
      if (start + W<T> > count || j + W<T> > width)
        for (int64_t i = 0; i < W<T> && start + i < count; ++i) store(v[i], to[i] + j, width - j);
      else if (past_caches)
        for (int i = 0; i < W<T>; ++i) stream_to(&at(to[i] + j), v[i]);
      else
        for (int i = 0; i < W<T>; ++i) store(v[i], to[i] + j);
    }
}

}  // namespace flowfast::FLOWFAST_ISA
