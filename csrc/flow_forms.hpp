// Two forms of the field mubar(c z, r) on a block of trajectories; the integrators know neither.
//   full: a slope is sum_k gamma_k mean_k, (d, B); the state is z, (d, B).
//   span: a slope is gamma, (k, B); with z = phi z_0 + sum_k c_k mean_k the state is [z . mean_k; c_k], (2 k, B).
// Slopes are kept unnormalised: their scale, 1 / sum gamma, goes into the coefficients they are added with.
#pragma once
#include "rows.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kStages = 16;  // most stages a tableau may have

// Rows of a job; the lanes beyond the last one repeat it. Rows are handed out in runs of at most B.
template <class T>
struct Batch {
  int64_t count = 0, row[B<T>];
  bool next(Work& work) {
    int64_t begin, end;
    if (!next_rows(work, begin, end)) return false;
    count = end - begin;
    for (int64_t l = 0; l < B<T>; ++l) row[l] = l < count ? begin + l : end - 1;
    return true;
  }
};

template <class T>
struct Slope {
  T* rows;
  Vec<T> scale[P];
};

// sum_l h coefficient_l slope_l, zero coefficients left out
template <class T>
struct Sum {
  const T* rows[kStages];
  Vec<T> factor[kStages][P];
  int size = 0;
  Sum() = default;
  Sum(const double* coefficients, int64_t count, const Vec<T>* h, const Slope<T>* slopes) {
    for (int64_t l = 0; l < count; ++l) {
      if (coefficients[l] == 0) continue;
      for (int p = 0; p < P; ++p) factor[size][p] = T(coefficients[l]) * h[p] * slopes[l].scale[p];
      rows[size++] = slopes[l].rows;
    }
  }
};

template <class T, bool kSpan>
class Form {
 public:
  Form(const FlowJob<T>& job, Arena& arena)
      : rows(kSpan ? (job.components->k + kRows - 1) / kRows * kRows : job.components->stride),
        state_rows(kSpan ? 2 * rows : rows),
        job_(job),
        c_(*job.components),
        center_(take<T>(arena, c_.stride)),
        sum_(take<T>(arena, rows * B<T>)),
        half_norms_(take<T>(arena, rows)),
        log_weights_(take<T>(arena, rows)),
        lanes_(take<T>(arena, kSpan ? rows * kTogether * W<T> : kPanel<T> * B<T>)),
        chunk_(take<T>(arena, kChunk * B<T>)) {
    for (int64_t j = 0; j < c_.stride; ++j) center_[j] = j < c_.d ? T(job.center[j]) : T(0);
    for (int64_t k = 0; kSpan && k < rows; ++k) {
      const Panel<T> part = panel(k / kPanel<T> * kPanel<T>);
      half_norms_[k] = part.half_norms[k % kPanel<T>], log_weights_[k] = part.log_weights[k % kPanel<T>];
    }
  }

  const int64_t rows, state_rows;  // of a slope; of a state, whose last `rows` rows leave

  // state (state_rows, B) <- the start of the batch, y = x / s_from - r_from center; size2 <- |y|^2
  void enter(const Batch<T>& batch, T* state, Vec<T>* size2) {
    const T* x[B<T>];
    T rate[B<T>], alpha[B<T>], rest[B<T>];
    for (int l = 0; l < B<T>; ++l) {
      const int64_t end = batch.row[l] * job_.ends_step;
      const double s = job_.ends[1][end], from = job_.ends[0][end] * s;
      x[l] = job_.x + batch.row[l] * c_.d;
      rate[l] = T(1 / s), alpha[l] = T(from), rest[l] = T(from - double(alpha[l]));
    }
    const auto start = [&, center = center_](int l, int64_t j, Vec<T> row) {
      return centred_row(center + j, alpha[l], rest[l], row) * rate[l];
    };
    for (int p = 0; p < P; ++p) size2[p] = Vec<T>{};
    for (int64_t i = 0; i < state_rows * B<T>; ++i) state[i] = 0;
    if constexpr (kSpan) {
      T *sums = lanes_, *points = chunk_;
      for (int l = 0; l < B<T>; l += kTogether) {
        Vec<T> square[kTogether] = {};
        for (int64_t i = 0; i < rows * kTogether * W<T>; i += W<T>) at(sums + i) = Vec<T>{};
        for (int64_t j = 0; j < c_.d; j += kChunk) {
          const int64_t padded = c_.stride - j < kChunk ? c_.stride - j : kChunk;
          for (int i = 0; i < kTogether; ++i) {
            if (l + kTogether < B<T>) prefetch<0>(x[l + kTogether + i] + j, padded);
            for (int64_t m = 0; m < padded; m += W<T>) {
              const Vec<T> y = start(l + i, j + m, load(x[l + i] + j + m, c_.d - j - m));
              at(points + i * kChunk + m) = y, square[i] += y * y;
            }
          }
          add_products(job_.columns + j * rows, rows, points, padded, sums);
        }
        sum_columns(sums, rows, state + l);
        for (int i = 0; i < kTogether; ++i) size2[(l + i) / W<T>][(l + i) % W<T>] = sum_lanes(square[i]);
      }
    } else {
      rows_to_lanes(x, c_.d, state, start);
      for (int p = 0; p < P; ++p)
        for (int64_t i = p * W<T>; i < c_.d * B<T>; i += B<T>) size2[p] += at(state + i) * at(state + i);
    }
  }

  // rows of out <- s_to (phi y_0 + leaving + r_to center); the full form has no phi
  void leave(const Batch<T>& batch, const T* leaving, double phi) {
    T scale[B<T>], keep[B<T>], shift[B<T>];
    T* part[B<T>];
    for (int64_t l = 0; l < batch.count; ++l) {
      const int64_t end = batch.row[l] * job_.ends_step;
      const double s = job_.ends[3][end], phi_s = kSpan ? phi * s : 0.0;
      scale[l] = T(s), keep[l] = T(phi_s / job_.ends[1][end]);
      shift[l] = T(s * job_.ends[2][end] - phi_s * job_.ends[0][end]), part[l] = chunk_ + l * kChunk;
    }
    // numbers j .. of row l, from the same numbers of `leaving`
    const auto put = [&, center = center_, x = job_.x, out = job_.out, d = c_.d](int64_t l, int64_t j, Vec<T> value) {
      const int64_t at_row = batch.row[l] * d + j;
      Vec<T> y = scale[l] * value + shift[l] * at(center + j);
      if (kSpan) y += keep[l] * load(x + at_row, d - j);
      store(y, out + at_row, d - j);
    };
    if constexpr (kSpan) {
      for (int64_t l = 0; l < batch.count; l += kTogether)
        for (int64_t j = 0; j < c_.d; j += kChunk) {
          const int64_t padded = c_.stride - j < kChunk ? c_.stride - j : kChunk;
          for (int64_t i = l + kTogether; i < batch.count && i < l + 2 * kTogether; ++i)
            prefetch<1>(job_.out + batch.row[i] * c_.d + j, padded);
          const auto tile = [&](auto across, int64_t m) {
            Vec<T> value[kTogether][across];
            weighted_means<across>(job_.columns + j * rows + m, rows, padded, leaving + l, value);
            for (int i = 0; i < kTogether && l + i < batch.count; ++i)
              for (int64_t c = 0; c < across && j + m + c * W<T> < c_.d; ++c) put(l + i, j + m + c * W<T>, value[i][c]);
          };
          int64_t m = 0;
          for (; m + kAcross * W<T> <= padded; m += kAcross * W<T>) tile(std::integral_constant<int, kAcross>{}, m);
          for (; m < padded; m += W<T>) tile(std::integral_constant<int, 1>{}, m);
        }
    } else {
      for (int64_t j = 0; j < c_.d; j += kChunk) {
        const int64_t width = c_.d - j < kChunk ? c_.d - j : kChunk;
        lanes_to_rows(leaving + j * B<T>, width, batch.count, part);
        for (int64_t l = 0; l < batch.count; ++l)
          for (int64_t i = 0; i < width; i += W<T>) put(l, j + i, at(part[l] + i));
      }
    }
  }

  // slope <- mubar at (1 + rho) state + sum; gain = r c, ratio = r / c
  void evaluate(const T* state, T rho, const Sum<T>& sum, const Vec<T>* gain_, const Vec<T>* ratio_, Slope<T>& slope) {
    Vec<T> gain[P], ratio[P], top[P];
    for (int p = 0; p < P; ++p) gain[p] = gain_[p] * T(kLog2e), ratio[p] = ratio_[p], top[p] = all(-Simd<T>::infinity);
    if constexpr (kSpan) {
      const bool one = sum.size == 1;  // scaled after the product
      const Vec<T> scale[P] = {one ? sum.factor[0][0] : all(T(1)), one ? sum.factor[0][1] : all(T(1))};
      // locals: members would be read again after every store
      const T *half_norms = half_norms_, *log_weights = log_weights_;
      T* to = slope.rows;
      const auto logit = [&, state, rho, half_norms, log_weights, to](int64_t k, int p, const Vec<T>& value) {
        const Vec<T> from = at(state + k * B<T> + p * W<T>), z = scale[p] * value + (rho * from + from);
        const Vec<T> logit = gain[p] * (z - ratio[p] * half_norms[k]) + log_weights[k];
        at(to + k * B<T> + p * W<T>) = logit;
        top[p] = larger(logit, top[p]);
      };
      if (sum.size > 0)
        product(one ? sum.rows[0] : add(sum), logit);
      else
        for (int64_t k = 0; k < rows; ++k)
          for (int p = 0; p < P; ++p) logit(k, p, Vec<T>{});
      weigh(top, slope);
    } else {
      Softmax<T> softmax;
      Vec<T> scale[P];
      int live[kPanel<T>];
      T* z = add(sum);
      for (int64_t i = 0; i < rows * B<T>; i += W<T>) at(z + i) += rho * at(state + i) + at(state + i);
      for (int64_t first = 0; first < c_.k; first += kPanel<T>) {
        const Panel<T> part = panel(first);
        project(part, c_.d, z, lanes_, [&](int64_t k, auto& tile) {
#pragma GCC unroll 32
          for (int i = 0; i < int(sizeof(tile) / sizeof(Vec<T>)); ++i) {
            Vec<T>& value = tile[i / P][i % P];
            value = gain[i % P] * (value - ratio[i % P] * part.half_norms[k + i / P]) + part.log_weights[k + i / P];
            top[i % P] = larger(value, top[i % P]);
          }
        });
        const int n_live = softmax.weigh(top, window_, lanes_, part.count, scale, live);
        accumulate(part, live, n_live, lanes_, slope.rows, first > 0 ? scale : nullptr);
      }
      for (int p = 0; p < P; ++p) slope.scale[p] = 1 / softmax.sum[p];
    }
  }

  // next = (1 + rho) state + sum; for rho = 0, size2 goes from |state|^2 to |next|^2
  void advance(const T* state, T rho, const Sum<T>& sum, T* next, Vec<T>* size2) {
    Vec<T> square[P] = {};
    const T* slope = add(sum);
    const int64_t half = rows * B<T>;
    const auto move = [&, state, rho, next, slope, half](int64_t k, int p, const Vec<T>& value) {
      const int64_t i = k * B<T> + p * W<T>;
      const Vec<T> w = at(slope + i), from = at(state + i), to = from + (rho * from + value);
      at(next + i) = to;
      square[p] += kSpan ? w * (from + to) : to * to;  // w . (2 y + w) is what w adds to |y|^2
      if constexpr (kSpan) at(next + half + i) = at(state + half + i) + (rho * at(state + half + i) + w);
    };
    if constexpr (kSpan)
      product(slope, move);
    else
      for (int64_t k = 0; k < rows; ++k)
        for (int p = 0; p < P; ++p) move(k, p, at(slope + k * B<T> + p * W<T>));
    for (int p = 0; p < P; ++p) size2[p] = kSpan ? larger(Vec<T>{}, size2[p] + square[p]) : square[p];
  }

 private:
  Panel<T> panel(int64_t first) const { return panel_at(c_, first, c_.packed + first * (c_.stride + 2)); }
  // logits -> weights in place
  void weigh(const Vec<T>* largest, Slope<T>& slope) const {
    const T window = window_;
    const Exp2<T> exp2;
    T* to = slope.rows;
    Vec<T> top[P], sum[P] = {};
    for (int p = 0; p < P; ++p) top[p] = largest[p];
    for (int64_t j = 0; j < rows * B<T>; j += kRows * W<T>) {
      Vec<T> value[kRows];
      Int<T> alive[kRows];
      for (int i = 0; i < kRows; ++i) {
        value[i] = at(to + j + i * W<T>) - top[i % P];
        alive[i] = ~(value[i] < -window);
      }
      exp2.each(value, alive);
      for (int i = 0; i < kRows; ++i) at(to + j + i * W<T>) = value[i], sum[i % P] += value[i];
    }
    for (int p = 0; p < P; ++p) slope.scale[p] = 1 / sum[p];
  }
  T* add(const Sum<T>& sum) const {  // gives sum_, filled
    T* to = sum_;
    for (int64_t first = 0; first < rows * B<T>; first += kRows * B<T>) {
      Vec<T> z[kRows * P] = {};
      for (int l = 0; l < sum.size; ++l)
        for (int i = 0; i < kRows * P; ++i) z[i] += sum.factor[l][i % P] * at(sum.rows[l] + first + i * W<T>);
      for (int i = 0; i < kRows * P; ++i) at(to + first + i * W<T>) = z[i];
    }
    return to;
  }

  // finish(k, p, register p of row k of gram weights) for every row; weights (k, B)
  template <class Finish>
  void product(const T* weights, const Finish& finish) const {
    int64_t k = 0;
    if constexpr (kTile == 8)
      for (; rows - k >= 20 || rows - k == 12; k += 12) product<12>(k, weights, finish);
    for (; rows - k >= kTile; k += kTile) product<kTile>(k, weights, finish);
    for (; k < rows; k += kRows) product<kRows>(k, weights, finish);
  }
  template <int Rows, class Finish>
  void product(int64_t k, const T* weights, const Finish& finish) const {
    const T* row = job_.gram + k;
    Vec<T> acc[Rows][P] = {};
    for (int64_t l = 0; l < rows; ++l, row += job_.k_pad, weights += B<T>) {
      Vec<T> weight[P];
      for (int p = 0; p < P; ++p) weight[p] = at(weights + p * W<T>);
#pragma GCC unroll 16
      for (int t = 0; t < Rows; ++t) {
        const Vec<T> entry = all(row[t]);
        for (int p = 0; p < P; ++p) acc[t][p] += entry * weight[p];
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows * P; ++i) finish(k + i / P, i % P, acc[i / P][i % P]);
  }

  const FlowJob<T>& job_;
  const Components<T>& c_;
  T *center_, *sum_, *half_norms_, *log_weights_;  // (stride,), (rows, B), (rows,), (rows,)
  T *lanes_, *chunk_;  // a tile of logits or sums of products; columns of points, B * kChunk
  const T window_ = T(kLog2e * __builtin_log(double(c_.k) / double(Simd<T>::eps)));  // weights left out: below eps
};

}  // namespace flowfast::FLOWFAST_ISA
