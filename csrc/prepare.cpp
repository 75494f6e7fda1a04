#include "prepare.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace flowfast {

template <class T>
Prepared<T>::Prepared(const T* means, const T* log_weights, int64_t k, int64_t d, bool centre) {
  const int64_t stride = (d + kPadColumns - 1) / kPadColumns * kPadColumns;
  center_.resize(size_t(stride));
  double* __restrict center = center_.data();
  index_.reserve(size_t(k));
  for (int64_t i = 0; i < k; ++i)
    if (log_weights[i] != -std::numeric_limits<T>::infinity()) index_.push_back(i);
  if (index_.empty())
    throw std::invalid_argument("log_weights: every component has weight 0; give one a positive weight");
  const int64_t live = int64_t(index_.size());
  for (int64_t i = 0; centre && i < live; ++i)
    for (int64_t j = 0; j < d; ++j) center[j] += double(means[index_[i] * d + j]);
  for (int64_t j = 0; j < d; ++j) center[j] /= double(live);
  const int64_t k_pad = (live + kPadRows - 1) / kPadRows * kPadRows;
  T* rows = static_cast<T*>(arena_.take(size_t(k_pad * (stride + 2)) * sizeof(T)));
  T *weights = rows + k_pad * stride, *half_norms = weights + k_pad;
  std::fill(rows + live * stride, half_norms + k_pad, T(0));
  std::fill(weights + live, weights + k_pad, -std::numeric_limits<T>::infinity());
  double largest = 0;
  for (int64_t i = 0; i < live; ++i) {
    T* __restrict row = rows + i * stride;
    const T* __restrict mean = means + index_[i] * d;
    for (int64_t j = 0; j < d; ++j) row[j] = T(double(mean[j]) - center[j]);
    std::fill(row + d, row + stride, T(0));
    double square[kPadColumns] = {}, sum = 0;
    for (int64_t j = 0; j < stride; j += kPadColumns)
      for (int64_t l = 0; l < kPadColumns; ++l) square[l] += double(row[j + l]) * double(row[j + l]);
    for (double part : square) sum += part;
    weights[i] = log_weights[index_[i]];
    half_norms[i] = T(sum / 2);
    largest = std::max(largest, sum);
  }
  view_ = {rows, weights, half_norms, index_.data(), center, means, std::sqrt(largest), live, k_pad, k, d, stride};
}

template class Prepared<float>;
template class Prepared<double>;

std::vector<double> step_table(const double* coefficients, const double* h, const double* tableau, int64_t m,
                               int64_t s) {
  std::vector<double> table(size_t(m * (s + 1) * (s + 3)), 0.0);
  for (int64_t i = 0; i < m; ++i) {
    double* rows = table.data() + i * (s + 1) * (s + 3);
    const double* stage = coefficients + i * s * 4;
    for (int64_t j = 0; j <= s; ++j) {
      double* row = rows + j * (s + 3);
      const double* butcher = tableau + (j < s ? j : s + 1) * s;
      for (int64_t l = 0; l < (j < s ? j : s); ++l) {
        const double weight = h[i] * butcher[l], a = stage[l * 4], *earlier = rows + l * (s + 3);
        row[0] += weight * a * (1 + earlier[0]);
        for (int64_t q = 0; q < l; ++q) row[3 + q] += weight * a * earlier[3 + q];
        row[3 + l] += weight * stage[l * 4 + 1];
      }
      if (j < s) row[1] = stage[j * 4 + 2], row[2] = stage[j * 4 + 3];
    }
  }
  return table;
}

}  // namespace flowfast
