// Two forms of the same field mubar(c z, r) on a block of trajectories; the integrators know neither.
//   FullForm: the state is z, (d, B).
//   SpanForm: z = phi z_0 + sum_k coefficient_k mean_k; the state is [z . mean_k; coefficient_k], (2 k, B).
// A form offers rows() of a state, the field at a stage, enter and leave for up to kTile lanes, and squared norms.
#pragma once
#include "products.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kStages = 16;  // most stages a tableau may have
constexpr int kRows = 4;     // rows of a state worked on together; every state has a multiple of it

// All weights left out together are below eps.
template <class T>
inline T flow_window(int64_t k) {
  return T(__builtin_log(double(k) / double(Simd<T>::eps)));
}

// z = base + (rho base + h sum_l coefficient_l slope_l), zero coefficients left out; base may be null (zero).
template <class T>
struct Stage {
  const T* base;
  T rho;
  const Vec<T>* h;
  const T* slope[kStages];
  T coefficient[kStages];
  int size = 0;
  template <class Slopes>
  Stage(const T* from, T rho_, const Vec<T>* h_, const double* coefficients, int64_t count, const Slopes& slopes)
      : base(from), rho(rho_), h(h_) {
    for (int64_t l = 0; l < count; ++l)
      if (coefficients[l] != 0) slope[size] = slopes[l], coefficient[size++] = T(coefficients[l]);
  }
  // z (kRows, P registers) = rows first .. first + kRows - 1
  void rows(int64_t first, Vec<T> (&z)[kRows][P]) const {
    for (int i = 0; i < kRows * P; ++i) z[i / P][i % P] = Vec<T>{};
    for (int l = 0; l < size; ++l)
      for (int i = 0; i < kRows * P; ++i) z[i / P][i % P] += coefficient[l] * at(slope[l] + first * B<T> + i * W<T>);
    for (int i = 0; i < kRows * P; ++i) {
      Vec<T>& value = z[i / P][i % P];
      value *= h[i % P];
      if (base) {
        const Vec<T> from = at(base + first * B<T> + i * W<T>);
        value = from + (rho * from + value);
      }
    }
  }
  void store(int64_t count, T* out) const {
    for (int64_t j = 0; j < count; j += kRows) {
      Vec<T> z[kRows][P];
      rows(j, z);
      for (int i = 0; i < kRows * P; ++i) at(out + j * B<T> + i * W<T>) = z[i / P][i % P];
    }
  }
};

template <class T>
class FullForm {
 public:
  FullForm(const FlowJob<T>& job, Arena& arena)
      : c_(*job.components),
        rows_((c_.d + kTile - 1) / kTile * kTile),
        tile_(take<T>(arena, kComponents<T> * B<T>)),
        z_(take<T>(arena, rows_ * B<T>)) {}

  int64_t rows() const { return rows_; }

  // slope (rows, B) = mubar of the stage, gain = r c, ratio = r / c
  void field(const Stage<T>& stage, const Vec<T>* gain, const Vec<T>* ratio, T* slope) {
    Softmax<T> softmax(flow_window<T>(c_.k));
    Vec<T> scale[P];
    int live[kComponents<T>];
    stage.store(rows_, z_);
    for (int64_t j = 0; j < rows_ * B<T>; ++j) slope[j] = 0;
    for (int64_t first = 0; first < c_.k_pad; first += kComponents<T>) {
      const int64_t count = c_.k_pad - first < kComponents<T> ? c_.k_pad - first : kComponents<T>;
      const T* rows = c_.rows + first * c_.stride;
      project(rows, c_.stride, count, z_, c_.d, tile_);
      logits(c_, first, count, gain, ratio, tile_);
      const int n_live = weigh(softmax, tile_, count, scale, live);
      rescale(slope, rows_, scale);
      accumulate(rows, c_.stride, live, n_live, tile_, rows_, slope);
    }
    for (int p = 0; p < P; ++p) scale[p] = 1 / softmax.sum[p];
    rescale(slope, rows_, scale);
  }

  // Column lane[l] of the state = row l of y (kTile, stride), l < count; the rows beyond count are anything finite.
  void enter(T* state, const int* lane, int count, const T* y) {
    for (int l = 0; l < count; ++l)
      for (int64_t j = 0; j < rows_; ++j) state[j * B<T> + lane[l]] = y[l * c_.stride + j];
  }
  void leave(const T* state, const int* lane, int count, double, T* y) const {
    for (int l = 0; l < count; ++l)
      for (int64_t j = 0; j < c_.d; ++j) y[l * c_.stride + j] = state[j * B<T> + lane[l]];
  }
  void squared_error(const Stage<T>& error, Vec<T>* out) const {
    Vec<T> z[kRows][P];
    for (int p = 0; p < P; ++p) out[p] = Vec<T>{};
    for (int64_t j = 0; j < rows_; j += kRows) {
      error.rows(j, z);
      for (int i = 0; i < kRows * P; ++i) out[i % P] += z[i / P][i % P] * z[i / P][i % P];
    }
  }
  void squared_size(const T* state, Vec<T>* out) const {
    for (int p = 0; p < P; ++p) {
      out[p] = Vec<T>{};
      for (int64_t j = p * W<T>; j < rows_ * B<T>; j += B<T>) out[p] += at(state + j) * at(state + j);
    }
  }

 private:
  const Components<T>& c_;
  const int64_t rows_;
  T* tile_;  // (kComponents, B)
  T* z_;     // (rows, B)
};

template <class T>
class SpanForm {
 public:
  SpanForm(const FlowJob<T>& job, Arena& arena)
      : c_(*job.components),
        k_((c_.k + kRows - 1) / kRows * kRows),
        gram_(job.gram),
        gram_stride_(job.gram_stride),
        start_(take<T>(arena, k_ * B<T>)),
        live_(take<int>(arena, k_)) {}

  int64_t rows() const { return 2 * k_; }

  // slope (2 k, B) = [gram gamma; gamma] of the stage
  void field(const Stage<T>& stage, const Vec<T>* gain, const Vec<T>* ratio, T* slope) {
    T* gamma = slope + k_ * B<T>;
    Vec<T> top[P], z[kRows][P];
    for (int p = 0; p < P; ++p) top[p] = all(-Simd<T>::infinity);
    for (int64_t k = 0; k < k_; k += kRows) {
      stage.rows(k, z);
      for (int i = 0; i < kRows * P; ++i) {
        const int p = i % P;
        const int64_t row = k + i / P;
        const Vec<T> logit = gain[p] * (z[i / P][p] - ratio[p] * c_.half_norms[row]) + c_.log_weights[row];
        at(gamma + k * B<T> + i * W<T>) = logit;
        top[p] = larger(logit, top[p]);
      }
    }
    const int n_live = weights(top, gamma);
    int64_t first = 0;
    for (; first + kTile <= k_; first += kTile) product<kTile>(first, n_live, gamma, slope);
    for (; first < k_; first += kRows) product<kRows>(first, n_live, gamma, slope);
  }

  void enter(T* state, const int* lane, int count, const T* y) {
    for (int64_t k = 0; k < k_; k += 2) {
      Vec<T> dot[2][kTile] = {};
      const T* row = c_.rows + k * c_.stride;
      for (int64_t j = 0; j < c_.stride; j += W<T>)
#pragma GCC unroll 8
        for (int l = 0; l < kTile; ++l) {
          const Vec<T> point = at(y + l * c_.stride + j);
          dot[0][l] += at(row + j) * point, dot[1][l] += at(row + c_.stride + j) * point;
        }
      for (int l = 0; l < count; ++l)
        for (int t = 0; t < 2; ++t) {
          const int64_t at_lane = (k + t) * B<T> + lane[l];
          start_[at_lane] = state[at_lane] = sum_lanes(dot[t][l]);
          state[k_ * B<T> + at_lane] = 0;
        }
    }
    for (int l = 0; l < count; ++l) start_norm_[lane[l]] = row_dot(y + l * c_.stride, y + l * c_.stride, c_.stride);
  }
  // Rows of y (kTile, stride) hold z_0 on entry, phi z_0 + sum_k coefficient_k mean_k on return.
  void leave(const T* state, const int* lane, int count, double phi, T* y) const {
    const T* coefficient = state + k_ * B<T>;
    int from[kTile];
    for (int l = 0; l < kTile; ++l) from[l] = lane[l < count ? l : 0];
    for (int64_t j = 0; j < c_.stride; j += W<T>) {
      Vec<T> sum[kTile];
      for (int l = 0; l < kTile; ++l) sum[l] = T(phi) * at(y + l * c_.stride + j);
      for (int64_t k = 0; k < c_.k; ++k) {
        const Vec<T> mean = at(c_.rows + k * c_.stride + j);
#pragma GCC unroll 8
        for (int l = 0; l < kTile; ++l) sum[l] += coefficient[k * B<T> + from[l]] * mean;
      }
      for (int l = 0; l < kTile; ++l) at(y + l * c_.stride + j) = sum[l];
    }
  }
  // |sum_k e_k mean_k|^2 = e . gram e
  void squared_error(const Stage<T>& error, Vec<T>* out) const {
    Vec<T> dot[kRows][P], e[kRows][P];
    for (int p = 0; p < P; ++p) out[p] = Vec<T>{};
    for (int64_t k = 0; k < k_; k += kRows) {
      error.rows(k, dot), error.rows(k_ + k, e);
      for (int i = 0; i < kRows * P; ++i) out[i % P] += dot[i / P][i % P] * e[i / P][i % P];
    }
    for (int p = 0; p < P; ++p) out[p] = larger(out[p], Vec<T>{});
  }
  // |z|^2 = |z_0|^2 + coefficient . (start + now), for phi = 1
  void squared_size(const T* state, Vec<T>* out) const {
    for (int p = 0; p < P; ++p) {
      out[p] = at(start_norm_ + p * W<T>);
      for (int64_t j = p * W<T>; j < k_ * B<T>; j += B<T>)
        out[p] += (at(state + j) + at(start_ + j)) * at(state + k_ * B<T> + j);
      out[p] = larger(out[p], Vec<T>{});
    }
  }

 private:
  // logits (k, B) -> normalised weights in place; lists the components with a weight above zero in some lane.
  int weights(const Vec<T>* top, T* gamma) {
    const T window = flow_window_;
    Vec<T> sum[P] = {};
    int n_live = 0;
    for (int64_t k = 0; k < k_; k += kRows) {
      Int<T> alive[kRows][P], either[kRows] = {}, group{};
      for (int i = 0; i < kRows * P; ++i) {
        Vec<T>& value = at(gamma + k * B<T> + i * W<T>);
        value -= top[i % P];
        either[i / P] |= alive[i / P][i % P] = ~(value < -window);
      }
      for (int t = 0; t < kRows; ++t) group |= either[t];
      const bool some = any(group);
      for (int i = 0; i < kRows * P; ++i) {
        Vec<T>& value = at(gamma + k * B<T> + i * W<T>);
        value = some ? (alive[i / P][i % P] ? exponential(value) : Vec<T>{}) : Vec<T>{};
        sum[i % P] += value;
      }
      for (int t = 0; some && t < kRows; ++t) live_[n_live] = int(k) + t, n_live += any(either[t]);
    }
    for (int p = 0; p < P; ++p) sum[p] = 1 / sum[p];
    for (int64_t j = 0; j < k_ * B<T>; j += B<T>)
      for (int p = 0; p < P; ++p) at(gamma + j + p * W<T>) *= sum[p];
    return n_live;
  }

  // rows first .. first + Rows - 1 of slope = gram gamma
  template <int Rows>
  void product(int64_t first, int n_live, const T* gamma, T* slope) const {
    Vec<T> sum[Rows][P] = {};
    for (int l = 0; l < n_live; ++l) {
      const T *row = gram_ + live_[l] * gram_stride_ + first, *weight = gamma + live_[l] * B<T>;
#pragma GCC unroll 8
      for (int t = 0; t < Rows; ++t)
        for (int p = 0; p < P; ++p) sum[t][p] += row[t] * at(weight + p * W<T>);
    }
    for (int t = 0; t < Rows; ++t)
      for (int p = 0; p < P; ++p) at(slope + (first + t) * B<T> + p * W<T>) = sum[t][p];
  }

  const Components<T>& c_;
  const int64_t k_;  // padded to kRows
  const T* gram_;
  const int64_t gram_stride_;
  const T flow_window_ = flow_window<T>(c_.k);
  T* start_;   // (k, B) projections at the start
  int* live_;  // (k,)
  alignas(kVectorBytes) T start_norm_[B<T>] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
