// Two forms of the field mubar(c z, r) on a block of trajectories; the integrators know neither.
//   FullForm: a slope is sum_k gamma_k mean_k, (d, B); the state is z, (d, B).
//   SpanForm: a slope is gamma, (k, B); with z = phi z_0 + sum_k c_k mean_k the state is [z . mean_k; c_k], (2 k, B).
// A form enters and leaves a batch of rows, evaluates a slope, and advances a state by a sum of slopes.
#pragma once
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kStages = 16;  // most stages a tableau may have

// All weights left out together are below eps; a difference of logits to the base 2.
template <class T>
inline T flow_window(int64_t k) {
  return T(kLog2e * __builtin_log(double(k) / double(Simd<T>::eps)));
}

// Up to B rows of a job; the lanes beyond the last one repeat it.
struct Batch {
  int64_t count = 0, row[64];
  template <class T>
  void take(int64_t begin, int64_t end) {
    count = end - begin < B<T> ? end - begin : B<T>;
    for (int l = 0; l < B<T>; ++l) row[l] = begin + (l < count ? l : count - 1);
  }
};

// A slope is rows * scale: weights are divided by their sum where they are used.
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
      rows[size] = slopes[l].rows;
      for (int p = 0; p < P; ++p) factor[size][p] = T(coefficients[l]) * h[p] * slopes[l].scale[p];
      ++size;
    }
  }
  // z (kRows, P registers) = rows first .. first + kRows - 1
  void get(int64_t first, Vec<T> (&z)[kRows][P]) const {
    for (int i = 0; i < kRows * P; ++i) z[i / P][i % P] = Vec<T>{};
    for (int l = 0; l < size; ++l)
      for (int i = 0; i < kRows * P; ++i) z[i / P][i % P] += factor[l][i % P] * at(rows[l] + first * B<T> + i * W<T>);
  }
};

// What both forms do with the rows of a job.
template <class T>
class Gate {
 protected:
  Gate(const FlowJob<T>& job, Arena& arena) : job_(job), c_(*job.components), center_(take<double>(arena, c_.stride)) {
    for (int64_t j = 0; j < c_.stride; ++j) center_[j] = j < c_.d ? job.center[j] : 0.0;
  }
  double end(int which, int64_t row) const { return job_.ends[which][row * job_.ends_step]; }
  int64_t width(int64_t j) const { return c_.d - j < kChunk ? c_.d - j : kChunk; }

  // lanes (width, B) <- columns j .. of y = x / s_from - r_from center; size2 += y^2
  void enter_chunk(const Batch& batch, int64_t j, T* lanes, Vec<T>* size2) const {
    const T* x[B<T>];
    double rate[B<T>], shift[B<T>];
    for (int l = 0; l < B<T>; ++l) {
      x[l] = job_.x + batch.row[l] * c_.d + j;
      rate[l] = 1 / end(1, batch.row[l]), shift[l] = end(0, batch.row[l]);
    }
    rows_to_lanes(x, width(j), lanes, [&](int lane, int64_t i, Vec<T> row) {
      for (int l = 0; l < W<T>; ++l) row[l] = T(double(row[l]) * rate[lane] - shift[lane] * center_[j + i + l]);
      return row;
    });
    for (int64_t i = 0; i < width(j); ++i)
      for (int p = 0; p < P; ++p) size2[p] += at(lanes + i * B<T> + p * W<T>) * at(lanes + i * B<T> + p * W<T>);
  }

  // columns j .. of the batch's rows of out <- s_to (phi z_0 + lanes + r_to center)
  void leave_chunk(const Batch& batch, int64_t j, double phi, const T* lanes) const {
    T* out[B<T>];
    for (int64_t l = 0; l < batch.count; ++l) out[l] = job_.out + batch.row[l] * c_.d + j;
    lanes_to_rows(lanes, width(j), batch.count, out);
    for (int64_t l = 0; l < batch.count; ++l) {
      const double r_from = end(0, batch.row[l]), s_from = end(1, batch.row[l]), s_to = end(3, batch.row[l]);
      const double keep = s_to * phi / s_from, shift = s_to * (end(2, batch.row[l]) - phi * r_from);
      const T* x = job_.x + batch.row[l] * c_.d + j;
      for (int64_t i = 0; i < width(j); ++i)
        out[l][i] = T(keep * double(x[i]) + shift * center_[j + i] + s_to * double(out[l][i]));
    }
  }

  const FlowJob<T>& job_;
  const Components<T>& c_;
  double* center_;  // (stride,)
};

template <class T>
class FullForm : Gate<T> {
  using Gate<T>::c_;

 public:
  FullForm(const FlowJob<T>& job, Arena& arena)
      : Gate<T>(job, arena), tile_(take<T>(arena, kPanel<T> * B<T>)), z_(take<T>(arena, c_.stride * B<T>)) {}

  int64_t rows() const { return c_.stride; }        // of a slope, and of what leaves
  int64_t state_rows() const { return c_.stride; }  // what leaves comes last

  // state (state_rows, B), |y|^2
  void enter(const Batch& batch, T* state, Vec<T>* size2) const {
    for (int p = 0; p < P; ++p) size2[p] = Vec<T>{};
    for (int64_t j = 0; j < c_.d; j += kChunk) this->enter_chunk(batch, j, state + j * B<T>, size2);
  }
  void leave(const Batch& batch, const T* leaving, double) {
    for (int64_t j = 0; j < c_.d; j += kChunk) this->leave_chunk(batch, j, 0.0, leaving + j * B<T>);
  }

  // The slope at (1 + rho) state + sum, gain = r c, ratio = r / c.
  void evaluate(const T* state, T rho, const Sum<T>& sum, const Vec<T>* gain_e, const Vec<T>* ratio_, Slope<T>& slope) {
    Softmax<T> softmax;
    Vec<T> scale[P], gain[P], ratio[P], top[P];
    int live[kPanel<T>];
    for (int p = 0; p < P; ++p) gain[p] = gain_e[p] * T(kLog2e), ratio[p] = ratio_[p], top[p] = softmax.top[p];
    advance(state, rho, sum, z_, nullptr);
    for (int64_t first = 0; first < c_.k; first += kPanel<T>) {
      const Panel<T> panel = panel_at(c_, first, c_.packed + first * (c_.stride + 2));
      project(panel, c_.d, z_, tile_, [&](int64_t k, auto& tile) {
#pragma GCC unroll 16
        for (int t = 0; t < int(sizeof(tile) / sizeof(tile[0])); ++t)
          for (int p = 0; p < P; ++p) {
            tile[t][p] = gain[p] * (tile[t][p] - ratio[p] * panel.half_norms[k + t]) + panel.log_weights[k + t];
            top[p] = larger(tile[t][p], top[p]);
          }
      });
      const int n_live = softmax.weigh(top, flow_window<T>(c_.k), tile_, panel.count, scale, live);
      accumulate(panel, live, n_live, tile_, slope.rows, first > 0 ? scale : nullptr);
    }
    for (int p = 0; p < P; ++p) slope.scale[p] = 1 / softmax.sum[p];
  }

  // next = (1 + rho) state + sum; size2, unless null: |next|^2
  void advance(const T* state, T rho, const Sum<T>& sum, T* next, Vec<T>* size2) const {
    Vec<T> z[kRows][P], square[P] = {};
    for (int64_t j = 0; j < c_.stride; j += kRows) {
      sum.get(j, z);
      for (int i = 0; i < kRows * P; ++i) {
        const Vec<T> from = at(state + j * B<T> + i * W<T>), to = from + (rho * from + z[i / P][i % P]);
        at(next + j * B<T> + i * W<T>) = to;
        square[i % P] += to * to;
      }
    }
    for (int p = 0; size2 && p < P; ++p) size2[p] = square[p];
  }
  // |sum|^2
  void measure(const Sum<T>& sum, Vec<T>* out) const {
    Vec<T> z[kRows][P];
    for (int p = 0; p < P; ++p) out[p] = Vec<T>{};
    for (int64_t j = 0; j < c_.stride; j += kRows) {
      sum.get(j, z);
      for (int i = 0; i < kRows * P; ++i) out[i % P] += z[i / P][i % P] * z[i / P][i % P];
    }
  }

 private:
  T *tile_, *z_;  // (kPanel, B), (stride, B)
};

template <class T>
class SpanForm : Gate<T> {
  using Gate<T>::c_;

 public:
  SpanForm(const FlowJob<T>& job, Arena& arena)
      : Gate<T>(job, arena),
        k_((c_.k + kRows - 1) / kRows * kRows),
        gram_(job.gram),
        gram_pitch_(job.k_pad),
        half_norms_(take<T>(arena, k_)),
        log_weights_(take<T>(arena, k_)),
        sum_(take<T>(arena, k_ * B<T>)),
        chunk_(take<T>(arena, kChunk * B<T>)),
        live_(take<int>(arena, k_)) {
    for (int64_t i = 0; i < k_; ++i) {
      const Panel<T> panel = this->panel(i / kPanel<T> * kPanel<T>);
      half_norms_[i] = panel.half_norms[i % kPanel<T>], log_weights_[i] = panel.log_weights[i % kPanel<T>];
      live_[i] = int(i);
    }
  }

  int64_t rows() const { return k_; }
  int64_t state_rows() const { return 2 * k_; }

  void enter(const Batch& batch, T* state, Vec<T>* size2) {
    for (int p = 0; p < P; ++p) size2[p] = Vec<T>{};
    for (int64_t i = 0; i < 2 * k_ * B<T>; ++i) state[i] = 0;
    for (int64_t j = 0; j < c_.d; j += kChunk) {
      this->enter_chunk(batch, j, chunk_, size2);
      for (int64_t first = 0; first < k_; first += kPanel<T>) {
        T* dots = state + first * B<T>;
        project(columns(panel(first), j), this->width(j), chunk_, dots, [&](int64_t k, auto& tile) {
          for (int i = 0; i < int(sizeof(tile) / sizeof(Vec<T>)); ++i)
            tile[i / P][i % P] += at(dots + k * B<T> + i * W<T>);
        });
      }
    }
  }
  void leave(const Batch& batch, const T* leaving, double phi) {
    const Vec<T> one[P] = {all(T(1)), all(T(1))};
    int every[kPanel<T>];
    for (int i = 0; i < kPanel<T>; ++i) every[i] = i;
    for (int64_t j = 0; j < c_.d; j += kChunk) {
      for (int64_t first = 0; first < k_; first += kPanel<T>) {
        const Panel<T> part = columns(panel(first), j);
        accumulate(part, every, int(part.count), leaving + first * B<T>, chunk_, first > 0 ? one : nullptr);
      }
      this->leave_chunk(batch, j, phi, chunk_);
    }
  }

  void evaluate(const T* state, T rho, const Sum<T>& sum, const Vec<T>* gain_e, const Vec<T>* ratio_, Slope<T>& slope) {
    Vec<T> gain[P], ratio[P], scale[P], top[P];
    for (int p = 0; p < P; ++p) gain[p] = gain_e[p] * T(kLog2e), ratio[p] = ratio_[p], top[p] = all(-Simd<T>::infinity);
    const T *half_norms = half_norms_, *log_weights = log_weights_;
    T* logits = slope.rows;
    const auto logit = [&, half_norms, log_weights, logits](int64_t row, int p, const Vec<T>& z) {
      const Vec<T> value = gain[p] * (z - ratio[p] * half_norms[row]) + log_weights[row];
      at(logits + row * B<T> + p * W<T>) = value;
      top[p] = larger(value, top[p]);
    };
    if (sum.size == 0) {
      for (int64_t row = 0; row < k_; ++row)
        for (int p = 0; p < P; ++p) {
          const Vec<T> from = at(state + row * B<T> + p * W<T>);
          logit(row, p, rho * from + from);
        }
    } else {
      const T* weights = sum_;
      if (sum.size == 1) {  // scaled after the product
        weights = sum.rows[0];
        for (int p = 0; p < P; ++p) scale[p] = sum.factor[0][p];
      } else {
        for (int p = 0; p < P; ++p) scale[p] = all(T(1));
        add(sum);
      }
      product(weights, [&](int64_t row, int p, const Vec<T>& value) {
        const Vec<T> from = at(state + row * B<T> + p * W<T>);
        logit(row, p, scale[p] * value + (rho * from + from));
      });
    }
    weigh(top, slope);
  }

  void advance(const T* state, T rho, const Sum<T>& sum, T* next, Vec<T>* size2) {
    Vec<T> square[P] = {};
    T* w = sum_;
    const T* coefficient = state + k_ * B<T>;
    T* next_coefficient = next + k_ * B<T>;
    add(sum);
    for (int64_t j = 0; j < k_ * B<T>; j += kRows * W<T>)
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> from = at(coefficient + j + i * W<T>);
        at(next_coefficient + j + i * W<T>) = from + (rho * from + at(w + j + i * W<T>));
      }
    product(w, [&, w, state, next, rho](int64_t row, int p, const Vec<T>& value) {
      const int64_t j = row * B<T> + p * W<T>;
      const Vec<T> from = at(state + j), to = from + (rho * from + value);
      at(next + j) = to;
      square[p] += at(w + j) * (from + to);  // |z + w|^2 - |z|^2 = w . (2 z + w)
    });
    for (int p = 0; size2 && p < P; ++p) size2[p] = larger(size2[p] + square[p], Vec<T>{});
  }
  // |sum_k e_k mean_k|^2 = e . gram e
  void measure(const Sum<T>& sum, Vec<T>* out) {
    Vec<T> square[P] = {};
    add(sum);
    product(sum_,
            [&](int64_t row, int p, const Vec<T>& value) { square[p] += at(sum_ + row * B<T> + p * W<T>) * value; });
    for (int p = 0; p < P; ++p) out[p] = larger(square[p], Vec<T>{});
  }

 private:
  Panel<T> panel(int64_t first) const { return panel_at(c_, first, c_.packed + first * (c_.stride + 2)); }
  static Panel<T> columns(const Panel<T>& p, int64_t j) {
    return {p.chunk(j), p.half_norms, p.log_weights, p.first, p.count, p.width(j)};
  }
  void add(const Sum<T>& sum) {
    Vec<T> z[kRows][P];
    T* to = sum_;
    for (int64_t k = 0; k < k_; k += kRows) {
      sum.get(k, z);
      for (int i = 0; i < kRows * P; ++i) at(to + k * B<T> + i * W<T>) = z[i / P][i % P];
    }
  }

  // logits -> weights in place, their sum
  void weigh(const Vec<T>* top_, Slope<T>& slope) const {
    const T window = flow_window_;
    T* weights = slope.rows;  // members are read again after every store to memory
    const Exp2<T> exp2;
    Vec<T> top[P], sum[P] = {};
    for (int p = 0; p < P; ++p) top[p] = top_[p];
    for (int64_t j = 0; j < k_ * B<T>; j += kRows * B<T>)
#pragma GCC unroll 8
      for (int i = 0; i < kRows * P; ++i) {
        const Vec<T> value = at(weights + j + i * W<T>) - top[i % P];
        const Vec<T> weight = exp2(value, ~(value < -window));
        at(weights + j + i * W<T>) = weight;
        sum[i % P] += weight;
      }
    for (int p = 0; p < P; ++p) slope.scale[p] = 1 / sum[p];
  }

  // finish(row, p, gram row . weights (k, B)) for every row
  template <class Finish>
  void product(const T* weights, const Finish& finish) const {
    int64_t first = 0;
    if constexpr (kTile == 8)
      for (; k_ - first >= 20 || k_ - first == 12; first += 12) product<12>(first, weights, finish);
    for (; k_ - first >= kTile; first += kTile) product<kTile>(first, weights, finish);
    for (; first < k_; first += kRows) product<kRows>(first, weights, finish);
  }
  template <int Rows, class Finish>
  void product(int64_t first, const T* weights, const Finish& finish) const {
    Vec<T> acc[Rows][P] = {};
    const T *row = gram_ + first, *weight = weights;
    for (int64_t l = 0; l < k_; ++l, row += gram_pitch_, weight += B<T>) {
      Vec<T> value[P];
      for (int p = 0; p < P; ++p) value[p] = at(weight + p * W<T>);
#pragma GCC unroll 16
      for (int t = 0; t < Rows; ++t) {
        const Vec<T> entry = all(row[t]);
        for (int p = 0; p < P; ++p) acc[t][p] += entry * value[p];
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows * P; ++i) finish(first + i / P, i % P, acc[i / P][i % P]);
  }

  const int64_t k_;  // padded to kRows
  const T* gram_;
  const int64_t gram_pitch_;
  T *half_norms_, *log_weights_, *sum_, *chunk_;  // (k,), (k,), (k, B), (kChunk, B)
  int* live_;
  const T flow_window_ = flow_window<T>(c_.k);
};

}  // namespace flowfast::FLOWFAST_ISA
