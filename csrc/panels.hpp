// Components in panels, and the two hot loops over a panel. A panel holds up to kPanel components, centred, in chunks
// of kChunk columns: [chunk 0 (count, kChunk)] [chunk 1] ... [half_norms (count)] [log_weights (count)], so that a
// chunk and the points' columns beside it stay in the nearest cache. Four rows lie column by column, (count / 4, width,
// 4): both loops then reach eight numbers from one or two addresses.
#pragma once
#include "exponential.hpp"
#include "lanes.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
constexpr int64_t kPanel = 256 / sizeof(T);
template <class T>
constexpr T kNoWeight = sizeof(T) == 4 ? T(-1e30) : T(-1e300);  // finite, so that differences of logits are numbers

template <class T>
struct Panel {
  const T *rows, *half_norms, *log_weights;  // chunks; |row|^2 / 2; base-2 logarithms
  int64_t first, count, stride;              // first component, components with the padding, padded dimension
  const T* chunk(int64_t j) const { return rows + j * count; }  // (count, width) of columns j ..
  int64_t width(int64_t j) const { return stride - j < kChunk ? stride - j : kChunk; }
};
// Offset of row k in a chunk; its columns are kRows apart.
inline int64_t row_offset(int64_t k, int64_t width) { return k / kRows * kRows * width + k % kRows; }

// a0 b0 a1 b1 ...: the first or the second half
template <class T, bool second, int... I>
inline Vec<T> zip(const Vec<T>& a, const Vec<T>& b, std::integer_sequence<int, I...>) {
  return pick<T>(a, b, std::integer_sequence<int, ((I + second * W<T>) / 2 + I % 2 * W<T>)...>{});
}

// to (W, kRows) <- the registers of kRows rows, column by column
template <class T>
inline void zip_rows(const Vec<T>* row, T* to) {
  constexpr auto lanes = std::make_integer_sequence<int, W<T>>{};
  const auto put = [&](const Vec<T>& even, const Vec<T>& odd, T* at_to) {
    at(at_to) = zip<T, false>(even, odd, lanes), at(at_to + W<T>) = zip<T, true>(even, odd, lanes);
  };
  put(zip<T, false>(row[0], row[2], lanes), zip<T, false>(row[1], row[3], lanes), to);
  put(zip<T, true>(row[0], row[2], lanes), zip<T, true>(row[1], row[3], lanes), to + 2 * W<T>);
}

template <class T>
int64_t packed_size(int64_t k, int64_t stride) {
  return (k + kRows - 1) / kRows * kRows * (stride + 2);
}

// The panel whose first component is `first`, in memory at `base`.
template <class T>
Panel<T> panel_at(const Components<T>& c, int64_t first, const T* base) {
  const int64_t left = (c.k - first + kRows - 1) / kRows * kRows, count = left < kPanel<T> ? left : kPanel<T>;
  return {base, base + count * c.stride, base + count * (c.stride + 1), first, count, c.stride};
}

// Logarithm to the base 2 of component k's weight.
template <class T>
T log2_weight(const Components<T>& c, int64_t k) {
  return k < c.k && c.log_weights[k] > kNoWeight<T> ? T(kLog2e * double(c.log_weights[k])) : kNoWeight<T>;
}

// Fills the memory of a panel; gives the largest |row|^2.
template <class T>
double pack_panel(const Components<T>& c, const Panel<T>& panel, T* base) {
  T *half_norms = base + panel.count * c.stride, *log_weights = half_norms + panel.count;
  double largest = 0;
  for (int64_t i = 0; i < panel.count; i += kRows) {
    double part[kRows][W<T>] = {};
    for (int64_t j = 0; j < c.stride; j += kChunk) {
      T* to = base + j * panel.count + i * panel.width(j);
      alignas(kVectorBytes) T sum[kRows][W<T>] = {};
      for (int64_t l = j; l < j + panel.width(j); l += W<T>) {
        Vec<T> row[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t k = panel.first + i + r;
          row[r] = k < c.k ? load(c.means + k * c.d + l, c.d - l) - at(c.center + l) : Vec<T>{};
          at(sum[r]) += row[r] * row[r];
        }
        zip_rows<T>(row, to + (l - j) * kRows);
      }
      for (int64_t r = 0; r < kRows; ++r)
        for (int l = 0; l < W<T>; ++l) part[r][l] += double(sum[r][l]);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t k = panel.first + i + r;
      double square = 0;
      for (double term : part[r]) square += term;
      if (square > largest) largest = square;
      half_norms[i + r] = T(square / 2);
      log_weights[i + r] = log2_weight(c, k);
    }
  }
  return largest;
}

template <class T>
double pack(const Components<T>& c, T* packed) {
  double largest = 0;
  for (int64_t first = 0; first < c.k; first += kPanel<T>) {
    T* base = packed + first * (c.stride + 2);
    const double found = pack_panel(c, panel_at(c, first, base), base);
    if (found > largest) largest = found;
  }
  return __builtin_sqrt(largest);
}

// Asks for memory that is soon read (or written): rows of many points are too many streams for the hardware.
template <int write, class T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, write);
}
template <class T>
struct Ahead {
  const T* from = nullptr;
  int64_t count = 0;
};

// A worker's view of the panels: the packed ones, or its own memory into which it packs what it is asked for.
template <class T>
class Panels {
 public:
  Panels(const Components<T>& c, Arena& arena)
      : c_(c), radius_(c.radius), own_(c.packed ? nullptr : take<T>(arena, kPanel<T> * (c.stride + 2))) {}
  Panel<T> get(int64_t first) {
    if (c_.packed) return panel_at(c_, first, c_.packed + first * (c_.stride + 2));
    const Panel<T> panel = panel_at<T>(c_, first, own_);
    const double radius = __builtin_sqrt(pack_panel(c_, panel, own_));
    if (radius > radius_) radius_ = radius;
    return panel;
  }
  // One of several parts of the panel after `first`, for project() to ask for while it works; empty where all stay
  // near.
  Ahead<T> ahead(int64_t first, int64_t part, int64_t parts) const {
    const int64_t next = first + kPanel<T>, left = c_.k - next, count = left < kPanel<T> ? left : kPanel<T>;
    if (c_.group == 1 || left <= 0) return {};
    const int64_t length = count * c_.d / parts;
    return {(c_.packed ? c_.packed + next * (c_.stride + 2) : c_.means + next * c_.d) + part * length, length};
  }
  double radius() const { return radius_; }  // max |row| of every panel so far

 private:
  const Components<T>& c_;
  double radius_;
  T* own_;
};

// acc (Rows, P) = rows . lanes (width, B) for rows that lie as in a chunk `pitch` wide
template <int Rows, class T>
inline void dot_tile(const T* rows, int64_t pitch, int64_t width, const T* lanes, Vec<T> (&acc)[Rows][P]) {
  for (int i = 0; i < Rows * P; ++i) acc[i / P][i % P] = Vec<T>{};
  for (int64_t j = 0; j < width; ++j) {
    Vec<T> point[P];
    for (int p = 0; p < P; ++p) point[p] = at(lanes + j * B<T> + p * W<T>);
#pragma GCC unroll 16
    for (int t = 0; t < Rows; ++t) {
      const Vec<T> mean = all(rows[t / kRows * kRows * pitch + j * kRows + t % kRows]);
      for (int p = 0; p < P; ++p) acc[t][p] += mean * point[p];
    }
  }
}

// dots (count, B) <- rows . lanes (d, B). Before they are written, finish(i, tile) may change the registers
// tile[t][p] of components i + t of the panel. Rounding: error_constant(d) u |row| |point|.
template <class T, class Finish>
void project(const Panel<T>& panel, int64_t d, const T* lanes, T* dots, const Finish& finish, Ahead<T> ahead = {}) {
  const int64_t piece = 1 + ahead.count * kTile / (panel.count * ((d + kChunk - 1) / kChunk));  // per tile
  const auto tile = [&](auto rows, int64_t j, int64_t i) {
    constexpr int Rows = decltype(rows)::value;
    const int64_t pitch = panel.width(j), width = d - j < kChunk ? d - j : kChunk;
    T* to = dots + i * B<T>;
    if (ahead.count > 0) prefetch<0>(ahead.from, piece), ahead.from += piece, ahead.count -= piece;
    Vec<T> acc[Rows][P];
    dot_tile<Rows>(panel.chunk(j) + i * pitch, pitch, width, lanes + j * B<T>, acc);
    for (int r = 0; j > 0 && r < Rows * P; ++r) acc[r / P][r % P] += at(to + r * W<T>);
    if (j + kChunk >= d) finish(i, acc);
    for (int r = 0; r < Rows * P; ++r) at(to + r * W<T>) = acc[r / P][r % P];
  };
  for (int64_t j = 0; j < d; j += kChunk) {
    int64_t i = 0;
    for (; i + kTile <= panel.count; i += kTile) tile(std::integral_constant<int, kTile>{}, j, i);
    for (; i < panel.count; i += kRows) tile(std::integral_constant<int, kRows>{}, j, i);
  }
}

// sum (stride, B) = sum * scale (P registers; null: zero) + sum over the listed components of weights (count, B) * rows
template <class T>
void accumulate(const Panel<T>& panel, const int* live, int n_live, const T* weights, T* sum, const Vec<T>* scale) {
  for (int64_t start = 0; start < panel.stride; start += kChunk) {
    const int64_t pitch = panel.width(start);
    for (int64_t j = 0; j < pitch; j += kTile) {
      T* to = sum + (start + j) * B<T>;
      const T* rows = panel.chunk(start) + j * kRows;
      Vec<T> acc[kTile][P];
      for (int i = 0; i < kTile * P; ++i) acc[i / P][i % P] = scale ? at(to + i * W<T>) * scale[i % P] : Vec<T>{};
      for (int l = 0; l < n_live; ++l) {
        const T *row = rows + row_offset(live[l], pitch), *weight = weights + live[l] * B<T>;
        Vec<T> w[P];
        for (int p = 0; p < P; ++p) w[p] = at(weight + p * W<T>);
#pragma GCC unroll 16
        for (int t = 0; t < kTile; ++t) {
          const Vec<T> mean = all(row[t * kRows]);
          for (int p = 0; p < P; ++p) acc[t][p] += mean * w[p];
        }
      }
      for (int i = 0; i < kTile * P; ++i) at(to + i * W<T>) = acc[i / P][i % P];
    }
  }
}

}  // namespace flowfast::FLOWFAST_ISA
