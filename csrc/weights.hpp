// Posterior weights, with components across the registers: rows of the output are written as they come, B components
// at a time, and leave past the caches.
#pragma once
#include "pairs.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kPoints = 8;  // rows worked on together

// out (width,) = row * scale, past the caches from one register boundary of `out` to the last
template <class T>
void stream_row(const T* row, int64_t width, T scale, T* out) {
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
  int64_t k = offset ? W<T> - offset : 0;
  const bool direct = width >= 8 * W<T>;  // shorter rows are mostly lines shared with their neighbours
  k = direct ? k : 0;
  for (int64_t j = 0; j < k; ++j) out[j] = row[j] * scale;
  for (; direct && k + W<T> <= width; k += W<T>) stream_to(&at(out + k), load(row + k) * scale);
  for (; k < width; k += W<T>) store(load(row + k) * scale, out + k, width - k);
}

// One row's logits (width,) with the largest `top` -> their posterior weights in out (k,).
template <class T>
void softmax_row(T* row, int64_t width, T top, int64_t k, T* out) {
  const Exp2<T> exp2;
  Vec<T> sum{};
  for (int64_t i = 0; i < width; i += W<T>) {
    const Vec<T> value = exp2(at(row + i) - top);
    at(row + i) = value;
    sum += value;
  }
  stream_row(row, k, 1 / sum_lanes(sum), out);
}

template <class T>
void weights(const PosteriorJob<T>& job, Work& work, Arena& arena) {
  const Components<T>& c = *job.components;
  const int64_t width = (c.k + B<T> - 1) / B<T> * B<T>, wide = c.stride * B<T>;
  const bool kept = width * c.stride * int64_t(sizeof(T)) <= (1 << 19);  // components in lanes: all, or one block
  const int64_t group = kept ? kPoints : 8 * kPoints;
  T *lanes = take<T>(arena, kept ? width * c.stride : wide), *half_norms = take<T>(arena, 2 * width);
  T *points = take<T>(arena, group * c.stride), *centred = take<T>(arena, c.stride),
    *logits = take<T>(arena, group * width);
  double *sums = take<double>(arena, 2 * c.d + c.k), radius2 = 0, square[8 * kPoints];
  T* log_weights = half_norms + width;
  const auto put_in_lanes = [&](int64_t first) {
    T* to = lanes + kept * first * c.stride;
    means_to_lanes(c, first, to);
    double norm2[B<T>] = {};
    for (int64_t j = 0; j < wide; j += B<T>)
      for (int l = 0; l < B<T>; ++l) norm2[l] += double(to[j + l]) * double(to[j + l]);
    for (int l = 0; l < B<T>; ++l) {
      half_norms[first + l] = T(norm2[l] / 2), log_weights[first + l] = log2_weight(c, first + l);
      radius2 = norm2[l] > radius2 ? norm2[l] : radius2;
    }
  };
  for (int64_t first = 0; kept && first < width; first += B<T>) put_in_lanes(first);
  int64_t begin, end;
  while (next_rows(work, begin, end))
    for (; begin < end; begin += group) {
      const int64_t count = end - begin < group ? end - begin : group;
      const auto row = [&](int64_t i) { return begin + (i < count ? i : count - 1); };
      const auto alpha = [&](int64_t i) { return job.alpha[row(i) * job.alpha_step]; };
      const auto std = [&](int64_t i) { return job.std[row(i) * job.std_step]; };
      Vec<T> top[8 * kPoints];
      T gain[8 * kPoints], ratio[8 * kPoints];
      for (int64_t i = 0; i < (count + kPoints - 1) / kPoints * kPoints; ++i) {
        Vec<T> sum{};
        ratio[i] = T(alpha(i)), gain[i] = T(kLog2e * alpha(i) / (std(i) * std(i)));
        const T rest = T(alpha(i) - double(ratio[i]));
        for (int64_t j = 0; j < c.stride; j += W<T>) {
          const Vec<T> value = centred_row(c.center + j, ratio[i], rest, load(job.x + row(i) * c.d + j, c.d - j));
          for (int l = 0; l < W<T>; ++l) points[row_offset(i, c.stride) + (j + l) * kRows] = value[l];
          sum += value * value;
        }
        square[i] = double(sum_lanes(sum)), top[i] = all(-Simd<T>::infinity);
      }
      for (int64_t first = 0; first < width; first += B<T>) {
        if (!kept) put_in_lanes(first);
        for (int64_t i = 0; i < count; i += kPoints) {
          Vec<T> dot[kPoints][P], part[kPoints][P];
          for (int64_t j = 0; j < c.d; j += kChunk) {
            const T* from = lanes + kept * first * c.stride + j * B<T>;
            const int64_t chunk = c.d - j < kChunk ? c.d - j : kChunk;
            dot_tile<kPoints>(points + i * c.stride + j * kRows, c.stride, chunk, from, j == 0 ? dot : part);
            for (int t = 0; j > 0 && t < kPoints * P; ++t) dot[t / P][t % P] += part[t / P][t % P];
          }
          for (int p = 0; p < P; ++p) {
            const int64_t k = first + p * W<T>;
            for (int t = 0; t < kPoints; ++t) {
              const Vec<T> logit = gain[i + t] * (dot[t][p] - ratio[i + t] * at(half_norms + k)) + at(log_weights + k);
              at(logits + (i + t) * width + k) = logit;
              top[i + t] = larger(logit, top[i + t]);
            }
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        T *values = logits + i * width, *out = job.out + (begin + i) * c.k;
        T largest = top[i][0];
        for (int l = 1; l < W<T>; ++l) largest = top[i][l] > largest ? top[i][l] : largest;
        softmax_row(values, width, largest, c.k, out);
        const double rho = __builtin_fabs(alpha(i)) * __builtin_sqrt(radius2) / std(i);
        const double error = error_constant(c.d) * __builtin_sqrt(square[i]) / std(i) * rho + 2 * rho * rho + 16;
        const T* x = job.x + (begin + i) * c.d;
        if (error <= double(allowed<T>(T(rho))) || !is_finite(x, c.d)) continue;
        int64_t leader = 0;
        for (int64_t k = 0; k < c.k; ++k) leader = values[k] > values[leader] ? k : leader;
        const double window = harmless_gap<T>(error, c.k);
        for (int64_t j = 0; j < c.stride; ++j) centred[j] = points[row_offset(i, c.stride) + j * kRows];
        refine_row(job, begin + i, {x, nullptr, centred, alpha(i), std(i), leader, window, false}, sums);
      }
    }
  drain();
}

}  // namespace flowfast::FLOWFAST_ISA
