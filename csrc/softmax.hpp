// Streaming softmax over panels of components; logits in units of ln 2.
#pragma once
#include "exponential.hpp"
#include "panels.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
struct Softmax {
  Vec<T> top[P], sum[P];  // largest logit so far, sum of 2^(logit - top)
  Softmax() {
    for (int p = 0; p < P; ++p) top[p] = all(-Simd<T>::infinity), sum[p] = Vec<T>{};
  }

  // logits (count, B) -> 2^(logit - top) in place, for the new `top` (P registers); weights below 2^-window are
  // exact zeros. Earlier sums must be multiplied by scale (P registers). live (count,) lists the components with a
  // weight above zero in some lane; gives how many.
  int weigh(const Vec<T>* new_top, T window, T* tile, int64_t count, Vec<T>* scale, int* live) {
    const Exp2<T> exp2;
    Vec<T> most[P], total[P];  // registers: memory that something might point to would be written at every turn
    for (int p = 0; p < P; ++p) {
      most[p] = new_top[p];
      scale[p] = exp2(top[p] - most[p]);
      total[p] = sum[p] * scale[p];
    }
    int n_live = 0;
    for (int64_t k = 0; k < count; ++k) {
      Int<T> alive[P], either{};
      Vec<T> value[P];
      for (int p = 0; p < P; ++p) {
        value[p] = at(tile + k * B<T> + p * W<T>) - most[p];
        either |= alive[p] = ~(value[p] < -window);
      }
      live[n_live] = int(k);
      n_live += any(either);
      for (int p = 0; p < P; ++p) {
        value[p] = exp2(value[p], alive[p]);
        at(tile + k * B<T> + p * W<T>) = value[p];
        total[p] += value[p];
      }
    }
    for (int p = 0; p < P; ++p) top[p] = most[p], sum[p] = total[p];
    return n_live;
  }
};

}  // namespace flowfast::FLOWFAST_ISA
