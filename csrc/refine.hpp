// One point done exactly: every quantity relative to its leading component a, logits by separation(). Serves points
// whose cheap logits are not accurate enough, and points whose posterior has collapsed to one component.
#pragma once
#include "products.hpp"
#include "separation.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
struct Point {
  const T *x, *v;    // (d,) as the caller gave them
  const T* centred;  // (stride,) x - alpha center
  double alpha, std;
  int64_t leader;      // component with the largest cheap logit
  double top, window;  // that logit; components below top - window have no weight at the precision of T
  bool collapsed;      // only the leader is inside the window
};

// Sums over components k of e_k = exp(l_k - l_a - top), with g_k = mean_k - mean_a.
struct Sums {
  double top, weight;       // largest l_k - l_a, sum e_k
  double second;            // sum e_k |g_k|^2
  double along;             // sum e_k g_k.v
  double *first, *through;  // (d,) sum e_k g_k,  sum e_k (g_k.v) g_k
};

template <class T>
void add_component(Sums& s, const T* mean, const T* leader, const T* v, int64_t d, double logit) {
  double weight = __builtin_exp(logit - s.top);
  if (logit > s.top) {
    const double scale = __builtin_exp(s.top - logit);
    s.weight *= scale, s.second *= scale, s.along *= scale;
    for (int64_t j = 0; j < d; ++j) s.first[j] *= scale;
    for (int64_t j = 0; v && j < d; ++j) s.through[j] *= scale;
    s.top = logit;
    weight = 1;
  }
  double square = 0, along = 0;
  for (int64_t j = 0; j < d; ++j) {
    const double gap = double(mean[j]) - double(leader[j]);
    square += gap * gap;
    s.first[j] += weight * gap;
    if (v) along += gap * double(v[j]);
  }
  for (int64_t j = 0; v && j < d; ++j) s.through[j] += weight * along * (double(mean[j]) - double(leader[j]));
  s.weight += weight;
  s.second += weight * square;
  s.along += weight * along;
}

// Fills the sums (first and through zeroed by the caller) and, where wanted, relative (k,): l_k - l_a or -inf.
template <class T>
Sums sum_components(const Components<T>& c, const Point<T>& point, double* first, double* through, double* relative) {
  Sums s{0, 1, 0, 0, first, through};
  if (point.collapsed && !relative) return s;
  const int64_t a = point.leader;
  const T* leader = c.means + c.index[a] * c.d;
  const double gain = point.alpha / (point.std * point.std);
  for (int64_t k = 0; k < c.k; ++k) {
    if (relative) relative[k] = k == a ? 0.0 : -__builtin_inf();
    if (k == a || point.collapsed) continue;
    const double dot = row_dot(c.rows + k * c.stride, point.centred, c.stride);
    const double cheap = gain * (dot - point.alpha * double(c.half_norms[k])) + double(c.log_weights[k]);
    if (cheap < point.top - point.window) continue;
    const T* mean = c.means + c.index[k] * c.d;
    const double logit = double(c.log_weights[k]) - double(c.log_weights[a]) +
                         gain * separation(mean, leader, point.x, point.alpha, c.d);
    if (relative) relative[k] = logit;
    add_component(s, mean, leader, point.v, c.d, logit);
  }
  return s;
}

// log N-mixture density from the leader's exact distance and log sum_k exp(l_k - l_a).
template <class T>
double density(const Components<T>& c, const T* x, double alpha, double std, int64_t leader, double log_sum) {
  const double distance = squared_distance(x, c.means + c.index[leader] * c.d, alpha, c.d);
  const double normaliser = 0.5 * double(c.d) * (1.8378770664093453 + 2 * __builtin_log(std));
  return (double(c.log_weights[leader]) + log_sum - normaliser) - 0.5 * distance / (std * std);
}

// Every output the job asks for, row i.
template <class T>
void refine_row(const PosteriorJob<T>& job, int64_t i, const Point<T>& point, double* scratch) {
  const Components<T>& c = *job.components;
  const int64_t d = c.d;
  double *first = scratch, *through = first + d, *relative = through + d;
  for (int64_t j = 0; j < (point.v ? 2 * d : d); ++j) scratch[j] = 0;
  const Sums s = sum_components(c, point, first, through, job.weights ? relative : nullptr);
  const T* leader = c.means + c.index[point.leader] * d;
  const double alpha = point.alpha, inverse = 1 / (point.std * point.std), share = 1 / s.weight;
  double norm = 0;
  for (int64_t j = 0; !point.collapsed && j < d; ++j) first[j] *= share, norm += first[j] * first[j];
  if (job.log_density)
    job.log_density[i] = T(density(c, point.x, alpha, point.std, point.leader, s.top + __builtin_log(s.weight)));
  if (job.trace) job.trace[i] = T(s.second * share > norm ? s.second * share - norm : 0.0);
  const auto fill = [d](T* out, auto value) {
    for (int64_t j = 0; j < d; ++j) out[j] = T(value(j));
  };
  if (job.score)
    fill(job.score + i * d, [leader, first, inverse, alpha, x = point.x](int64_t j) {
      return (__builtin_fma(alpha, double(leader[j]), -double(x[j])) + alpha * first[j]) * inverse;
    });
  if (job.posterior_mean)
    fill(job.posterior_mean + i * d, [leader, first](int64_t j) { return double(leader[j]) + first[j]; });
  const double curvature = alpha * alpha * inverse * inverse * share;
  if (job.hvp)
    fill(job.hvp + i * d, [through, first, curvature, inverse, along = s.along, v = point.v](int64_t j) {
      return curvature * (through[j] - along * first[j]) - double(v[j]) * inverse;
    });
  if (!job.weights) return;
  T* weights = job.weights + i * c.k_all;
  for (int64_t k = 0; k < c.k_all; ++k) weights[k] = 0;
  for (int64_t k = 0; k < c.k; ++k) weights[c.index[k]] = T(__builtin_exp(relative[k] - s.top) * share);
}

}  // namespace flowfast::FLOWFAST_ISA
