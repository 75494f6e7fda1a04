// Streaming softmax over tiles of components. Logit k = log_weight_k + gain * (dot_k - ratio * |row_k|^2 / 2) with
// gain = alpha / s^2, ratio = alpha in the posterior, gain = r c, ratio = r / c in the flow.
#pragma once
#include "exponential.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
constexpr int64_t kComponents = 256 / sizeof(T);  // components per tile: the tile's weights stay in L1

template <class T>
struct Softmax {
  Vec<T> top[P], sum[P];  // running maximum of the logits, sum of exp(logit - top)
  T window;               // weights below exp(-window) are exact zeros
  explicit Softmax(T w) : window(w) {
    for (int p = 0; p < P; ++p) top[p] = all(-Simd<T>::infinity), sum[p] = Vec<T>{};
  }
};

// dots (count, B) -> logits (count, B) in place, for components first .. first + count - 1
template <class T>
void logits(const Components<T>& c, int64_t first, int64_t count, const Vec<T>* gain, const Vec<T>* ratio, T* tile) {
  for (int64_t k = 0; k < count; ++k)
    for (int p = 0; p < P; ++p) {
      Vec<T>& value = at(tile + k * B<T> + p * W<T>);
      value = gain[p] * (value - ratio[p] * c.half_norms[first + k]) + c.log_weights[first + k];
    }
}

// logits (count, B) -> exp(logit - top) in place, top raised first; earlier sums must be multiplied by scale (P
// registers). live (count,) lists the components with a weight above zero in some lane; returns how many.
template <class T>
int weigh(Softmax<T>& s, T* tile, int64_t count, Vec<T>* scale, int* live) {
  Vec<T> top[P];
  for (int p = 0; p < P; ++p) top[p] = s.top[p];
  for (int64_t k = 0; k < count; ++k)
    for (int p = 0; p < P; ++p) top[p] = larger(at(tile + k * B<T> + p * W<T>), top[p]);
  for (int p = 0; p < P; ++p) {
    scale[p] = exponential(s.top[p] - top[p]);
    s.top[p] = top[p];
    s.sum[p] *= scale[p];
  }
  int n_live = 0;
  for (int64_t k = 0; k < count; ++k) {
    Int<T> alive[P], either{};
    for (int p = 0; p < P; ++p) {
      Vec<T>& value = at(tile + k * B<T> + p * W<T>);
      value -= s.top[p];
      alive[p] = ~(value < -s.window);
      either |= alive[p];
    }
    if (any(either)) {
      live[n_live++] = int(k);
      for (int p = 0; p < P; ++p) {
        Vec<T>& value = at(tile + k * B<T> + p * W<T>);
        value = alive[p] ? exponential(value) : Vec<T>{};
        s.sum[p] += value;
      }
    } else {
      for (int p = 0; p < P; ++p) at(tile + k * B<T> + p * W<T>) = Vec<T>{};
    }
  }
  return n_live;
}

// rows (count, B) *= scale, skipped where it would change nothing
template <class T>
void rescale(T* rows, int64_t count, const Vec<T>* scale) {
  Int<T> changed{};
  for (int p = 0; p < P; ++p) changed |= scale[p] != 1;
  if (!any(changed)) return;
  for (int64_t j = 0; j < count; ++j)
    for (int p = 0; p < P; ++p) at(rows + j * B<T> + p * W<T>) *= scale[p];
}

}  // namespace flowfast::FLOWFAST_ISA
