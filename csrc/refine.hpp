// One point done exactly: every quantity relative to its leading component a, logits by separation(). Serves points
// whose cheap logits are not accurate enough, and points whose posterior has collapsed to one component.
#pragma once
#include "panels.hpp"
#include "separation.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
struct Point {
  const T *x, *v;    // (d,) as the caller gave them
  const T* centred;  // (stride,) x - alpha center
  double alpha, std;
  int64_t leader;  // component with the largest cheap logit
  double window;   // components below the leader by more have no weight at the precision of T
  bool collapsed;  // only the leader is inside the window
};

// Logit of component k by products of centred rows, up to what all components share.
template <class T>
double cheap_logit(const Components<T>& c, const Point<T>& point, int64_t k) {
  const T* mean = c.means + k * c.d;
  const T half = T(0.5 * point.alpha);
  Vec<T> sum{};
  for (int64_t j = 0; j < c.stride; j += W<T>) {
    const Vec<T> row = load(mean + j, c.d - j) - at(c.center + j);
    sum += row * (at(point.centred + j) - half * row);
  }
  return point.alpha / (point.std * point.std) * double(sum_lanes(sum)) + double(c.log_weights[k]);
}

// log N-mixture density from the leader's exact distance and log sum_k exp(l_k - l_a).
template <class T>
double density(const Components<T>& c, const T* x, double alpha, double std, int64_t leader, double log_sum) {
  const double distance = squared_distance(x, c.means + leader * c.d, alpha, c.d);
  const double normaliser = 0.5 * double(c.d) * (1.8378770664093453 + 2 * __builtin_log(std));
  return (double(c.log_weights[leader]) + log_sum - normaliser) - 0.5 * distance / (std * std);
}

// The job's output for row i. scratch (2 d + k,).
template <class T>
void refine_row(const PosteriorJob<T>& job, int64_t i, const Point<T>& point, double* scratch) {
  const Components<T>& c = *job.components;
  const int64_t d = c.d, a = point.leader;
  const T* leader = c.means + a * d;
  const double alpha = point.alpha, inverse = 1 / (point.std * point.std);
  double *relative = scratch + 2 * d, top = 0, weight = 0, second = 0, along = 0;
  const double cheap_top = point.collapsed ? 0 : cheap_logit(c, point, a);
  for (int64_t k = 0; k < c.k; ++k) {
    relative[k] = k == a ? 0.0 : -__builtin_inf();
    if (k == a || point.collapsed || !(cheap_logit(c, point, k) >= cheap_top - point.window)) continue;
    relative[k] = double(c.log_weights[k]) - double(c.log_weights[a]) +
                  alpha * inverse * separation(c.means + k * d, leader, point.x, alpha, d);
    if (relative[k] > top) top = relative[k];
  }
  double *first = scratch, *through = first + d;  // sum e_k g_k and sum e_k (g_k.v) g_k with g_k = mean_k - mean_a
  for (int64_t j = 0; j < 2 * d; ++j) scratch[j] = 0;
  for (int64_t k = 0; k < c.k; ++k) {
    if (relative[k] == -__builtin_inf()) continue;
    const double e = __builtin_exp(relative[k] - top);
    weight += e;
    if (k == a || job.output == Output::log_density || job.output == Output::weights) continue;
    const T* mean = c.means + k * d;
    double square = 0, product = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double gap = double(mean[j]) - double(leader[j]);
      square += gap * gap;
      first[j] += e * gap;
      if (point.v) product += gap * double(point.v[j]);
    }
    for (int64_t j = 0; point.v && j < d; ++j) through[j] += e * product * (double(mean[j]) - double(leader[j]));
    second += e * square, along += e * product;
  }
  const double share = 1 / weight, curvature = alpha * alpha * inverse * inverse * share;
  double norm = 0;
  for (int64_t j = 0; j < d; ++j) first[j] *= share, norm += first[j] * first[j];
  T* out = job.out + i * (job.output == Output::weights ? c.k : d);
  switch (job.output) {
    case Output::log_density:
      job.out[i] = T(density(c, point.x, alpha, point.std, a, top + __builtin_log(weight)));
      break;
    case Output::trace:
      job.out[i] = T(second * share > norm ? second * share - norm : 0.0);
      break;
    case Output::weights:
      for (int64_t k = 0; k < c.k; ++k) out[k] = T(__builtin_exp(relative[k] - top) * share);
      break;
    case Output::score:
      for (int64_t j = 0; j < d; ++j)
        out[j] = T((__builtin_fma(alpha, double(leader[j]), -double(point.x[j])) + alpha * first[j]) * inverse);
      break;
    case Output::posterior_mean:
      for (int64_t j = 0; j < d; ++j) out[j] = T(double(leader[j]) + first[j]);
      break;
    case Output::hvp:
      for (int64_t j = 0; j < d; ++j)
        out[j] = T(curvature * (through[j] - along * first[j]) - double(point.v[j]) * inverse);
      break;
  }
}

}  // namespace flowfast::FLOWFAST_ISA
