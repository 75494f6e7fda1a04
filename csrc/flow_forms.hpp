// Two forms of the same field mubar(c z, r) on a block of trajectories; the integrators of flow.hpp know neither.
//   FullForm: the state is z, (d, B).
//   SpanForm: z = phi z_0 + sum_k coefficient_k mean_k; the state is [z . mean_k; coefficient_k], (2 k_pad, B), and a
//   stage
//             needs the first k_pad rows only.
// A form offers rows() of a state, stage_rows() of them needed by field(), enter/leave for one lane, and squared norms.
#pragma once
#include "products.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

// All weights left out together are below eps.
template <class T>
inline T flow_window(int64_t k) {
  return T(__builtin_log(double(k) / double(Simd<T>::eps)));
}

template <class T>
class FullForm {
 public:
  FullForm(const FlowJob<T>& job, Arena& arena)
      : c_(*job.components), rows_((c_.d + kTile - 1) / kTile * kTile), tile_(take<T>(arena, kComponents<T> * B<T>)) {}

  int64_t rows() const { return rows_; }
  int64_t stage_rows() const { return rows_; }

  // slope (rows, B) = mubar of z (rows, B), gain = r c, ratio = r / c
  void field(const T* z, const Vec<T>* gain, const Vec<T>* ratio, T* slope) {
    Softmax<T> softmax(flow_window<T>(c_.k));
    Vec<T> scale[P];
    int live[kComponents<T>];
    for (int64_t j = 0; j < rows_ * B<T>; ++j) slope[j] = 0;
    for (int64_t first = 0; first < c_.k_pad; first += kComponents<T>) {
      const int64_t count = c_.k_pad - first < kComponents<T> ? c_.k_pad - first : kComponents<T>;
      const T* rows = c_.rows + first * c_.stride;
      project(rows, c_.stride, count, z, c_.d, tile_);
      logits(c_, first, count, gain, ratio, tile_);
      const int n_live = weigh(softmax, tile_, count, scale, live);
      rescale(slope, rows_, scale);
      accumulate(rows, c_.stride, live, n_live, tile_, rows_, slope);
    }
    for (int p = 0; p < P; ++p) scale[p] = 1 / softmax.sum[p];
    rescale(slope, rows_, scale);
  }

  void enter(T* state, int lane, const T* y) {
    for (int64_t j = 0; j < rows_; ++j) state[j * B<T> + lane] = y[j];
  }
  void leave(const T* state, int lane, double, T* y) const {
    for (int64_t j = 0; j < c_.d; ++j) y[j] = state[j * B<T> + lane];
  }
  void squared_error(const T* error, Vec<T>* out) const { squares(error, out); }
  void squared_size(const T* state, Vec<T>* out) const { squares(state, out); }

 private:
  void squares(const T* a, Vec<T>* out) const {
    for (int p = 0; p < P; ++p) {
      out[p] = Vec<T>{};
      for (int64_t j = 0; j < rows_; ++j) out[p] += at(a + j * B<T> + p * W<T>) * at(a + j * B<T> + p * W<T>);
    }
  }

  const Components<T>& c_;
  const int64_t rows_;
  T* tile_;  // (kComponents, B)
};

template <class T>
class SpanForm {
 public:
  SpanForm(const FlowJob<T>& job, Arena& arena)
      : c_(*job.components),
        gram_(job.gram),
        gram_stride_(job.gram_stride),
        start_(take<T>(arena, c_.k_pad * B<T>)),
        live_(take<int>(arena, c_.k_pad)) {}

  int64_t rows() const { return 2 * c_.k_pad; }
  int64_t stage_rows() const { return c_.k_pad; }

  // slope (2 k_pad, B) = [gram gamma; gamma] at projections z (k_pad, B)
  void field(const T* z, const Vec<T>* gain, const Vec<T>* ratio, T* slope) {
    const int64_t size = c_.k_pad * B<T>;
    T* gamma = slope + size;
    for (int64_t j = 0; j < size; ++j) gamma[j] = z[j], slope[j] = 0;
    Softmax<T> softmax(flow_window<T>(c_.k));
    Vec<T> scale[P];
    logits(c_, 0, c_.k_pad, gain, ratio, gamma);
    const int n_live = weigh(softmax, gamma, c_.k_pad, scale, live_);
    for (int p = 0; p < P; ++p) scale[p] = 1 / softmax.sum[p];
    rescale(gamma, c_.k_pad, scale);
    for (int first = 0; first < n_live; first += int(kComponents<T>)) {
      const int count = n_live - first < int(kComponents<T>) ? n_live - first : int(kComponents<T>);
      accumulate(gram_, gram_stride_, live_ + first, count, gamma, c_.k_pad, slope);
    }
  }

  void enter(T* state, int lane, const T* y) {
    for (int64_t k = 0; k < c_.k_pad; ++k) {
      const T dot = row_dot(c_.rows + k * c_.stride, y, c_.stride);
      start_[k * B<T> + lane] = state[k * B<T> + lane] = dot;
      state[(c_.k_pad + k) * B<T> + lane] = 0;
    }
    start_norm_[lane] = row_dot(y, y, c_.stride);
  }
  // y (stride,) holds z_0 on entry, phi z_0 + sum_k coefficient_k mean_k on return
  void leave(const T* state, int lane, double phi, T* y) const {
    for (int64_t j = 0; j < c_.stride; j += W<T>) at(y + j) *= T(phi);
    for (int64_t k = 0; k < c_.k; ++k) {
      const T coefficient = state[(c_.k_pad + k) * B<T> + lane];
      const T* row = c_.rows + k * c_.stride;
      for (int64_t j = 0; j < c_.stride; j += W<T>) at(y + j) += coefficient * at(row + j);
    }
  }
  // |sum_k e_k mean_k|^2 = e . gram e
  void squared_error(const T* error, Vec<T>* out) const {
    dots(error, error + c_.k_pad * B<T>, nullptr, out);
    for (int p = 0; p < P; ++p) out[p] = larger(out[p], Vec<T>{});
  }
  // |z|^2 = |z_0|^2 + coefficient . (start + now), for phi = 1
  void squared_size(const T* state, Vec<T>* out) const {
    dots(state, state + c_.k_pad * B<T>, start_, out);
    for (int p = 0; p < P; ++p) out[p] = larger(out[p] + at(start_norm_ + p * W<T>), Vec<T>{});
  }

 private:
  void dots(const T* a, const T* b, const T* added, Vec<T>* out) const {
    for (int p = 0; p < P; ++p) {
      out[p] = Vec<T>{};
      for (int64_t j = p * W<T>; j < c_.k_pad * B<T>; j += B<T>)
        out[p] += (added ? at(a + j) + at(added + j) : at(a + j)) * at(b + j);
    }
  }

  const Components<T>& c_;
  const T* gram_;
  const int64_t gram_stride_;
  T* start_;   // (k_pad, B) projections at the start
  int* live_;  // (k_pad,)
  alignas(kVectorBytes) T start_norm_[B<T>] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
