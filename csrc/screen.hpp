// Screen and refine. The streaming pass leaves a bound on the error of each point's logits; where it exceeds the
// contract, or where cancellation would show in the output, the row is done again by refine_row. The contract, for
// every x:
//   error <= max(1e-10, 64 eps (1 + alpha max |m| / s)), in units of sqrt(E |x - m|^2) / s^2 for the score, of
//   (1 / s^2 + tr C / s^4) |v| for the Hessian-vector product, of 1 for weights and log-density.
#pragma once
#include "posterior.hpp"

namespace flowfast::FLOWFAST_ISA {

// What the bound says about each lane.
template <class T>
struct Verdict {
  double limit[B<T>], window[B<T>];   // error the contract allows; gap below the maximum that cannot matter
  bool cheap[B<T>], collapsed[B<T>];  // the pass is accurate enough; one component has all the weight
};

template <class T>
void judge(const Components<T>& c, const PosteriorBlock<T>& b, double constant, double margin, Verdict<T>& verdict) {
  const double u = Simd<T>::eps / 2, least = sizeof(T) == sizeof(double) ? 2e-11 : 0.0;
  for (int lane = 0; lane < B<T>; ++lane) {
    const double rho = __builtin_fabs(b.alpha[lane]) * c.radius / b.std[lane];
    const double delta = u * (constant * b.xi[lane] * rho + 2 * rho * rho + 16), limit = 128 * u * (1 + rho);
    verdict.limit[lane] = limit < least ? least : limit;
    verdict.window[lane] = 2 * delta + margin;
    verdict.cheap[lane] = (delta <= verdict.limit[lane]) & (b.sum[lane] - b.sum[lane] == 0);
    verdict.collapsed[lane] = double(b.top[lane]) - double(b.second_top[lane]) > verdict.window[lane];
  }
}

template <class T>
bool is_finite(const T* x, int64_t d) {
  T sum = 0;
  for (int64_t j = 0; j < d; ++j) sum += x[j] - x[j];
  return sum == 0;
}

// second (B,) <- the trace; rows in which it is a difference of nearly equal numbers are marked.
template <class T>
void finish_trace(const Components<T>& c, const Verdict<T>& verdict, PosteriorBlock<T>& b) {
  for (int p = 0; p < P; ++p) {
    const Vec<T> share = 1 / at(b.sum + p * W<T>);
    Vec<T> norm2{};
    for (int64_t j = p * W<T>; j < c.d * B<T>; j += B<T>) {
      const Vec<T> mean = at(b.mean + j) * share;
      norm2 += mean * mean;
    }
    Vec<T>& second = at(b.second + p * W<T>);
    second = 2 * share * second - norm2;
  }
  const double u = Simd<T>::eps / 2;
  for (int lane = 0; lane < B<T>; ++lane)
    b.exact[lane] |= !(8 * u * c.radius * c.radius <= verdict.limit[lane] * double(b.second[lane]));
}

enum class Output { score, posterior_mean, hvp };

// Rows begin .. begin + count - 1 of out (., d) <- a vector output of the pass; rows to be done again are overwritten
// later. Marks the rows in which the score is a difference of nearly equal numbers.
template <Output output, class T>
void write_rows(const Components<T>& c, PosteriorBlock<T>& b, const Verdict<T>& verdict, int64_t begin, int64_t count,
                T* out) {
  alignas(kVectorBytes) T distance[B<T>];
  for (int64_t start = 0; start < B<T>; start += W<T>) {
    const Vec<T> alpha = at(b.ratio + start), inverse = at(b.inverse + start), share = 1 / at(b.sum + start);
    const Vec<T> along = at(b.along + start) * share, curvature = alpha * inverse * alpha * inverse;
    Vec<T> square{};
    for (int64_t j = 0; j < c.d; j += W<T>) {
      Vec<T> value[W<T>];
      for (int i = 0; i < W<T>; ++i) {
        const int64_t from = (j + i) * B<T> + start;
        const Vec<T> mean = at(b.mean + from) * share;
        if constexpr (output == Output::score) {
          const Vec<T> gap = alpha * mean - at(b.points + from);
          square += gap * gap;
          value[i] = gap * inverse;
        } else if constexpr (output == Output::posterior_mean) {
          value[i] = mean;
        } else {
          value[i] = curvature * (at(b.through + from) * share - along * mean) - at(b.directions + from) * inverse;
        }
      }
      transpose_steps<T, 1>(value);
      const int64_t width = c.d - j < W<T> ? c.d - j : W<T>;
      for (int64_t i = 0; i < W<T> && start + i < count; ++i) {
        T* to = out + (begin + start + i) * c.d + j;
        alignas(kVectorBytes) T row[W<T>];
        at(row) = value[i];
        for (int l = 0; output == Output::posterior_mean && l < W<T>; ++l) row[l] = T(double(row[l]) + c.center[j + l]);
        if (width == W<T>)
          __builtin_memcpy(to, row, sizeof(row));
        else
          for (int64_t l = 0; l < width; ++l) to[l] = row[l];
      }
    }
    at(distance + start) = square;
  }
  if (output != Output::score) return;
  const double u = Simd<T>::eps / 2;
  for (int lane = 0; lane < B<T>; ++lane) {
    const double reach = __builtin_fabs(b.alpha[lane]) * c.radius + b.xi[lane] * b.std[lane];
    b.exact[lane] |= !(4 * u * reach <= verdict.limit[lane] * __builtin_sqrt(double(distance[lane])));
  }
}

// out (width,) = row, past the caches from one register boundary of `out` to the last; any alignment
template <class T>
void stream_row(const T* row, int64_t width, T* out) {
  const int64_t offset = int64_t(reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
  const bool direct = width >= 8 * W<T>;  // shorter rows are mostly lines shared with their neighbours
  int64_t k = 0;
  for (; direct && (offset + k) % W<T>; ++k) out[k] = row[k];
  for (; direct && k + W<T> <= width; k += W<T>) {
    Vec<T> value;
    __builtin_memcpy(&value, row + k, sizeof(value));
    stream_to(&at(out + k), value);
  }
  for (; k < width; ++k) out[k] = row[k];
}

// weights (count, k_all) from the kept ones
template <class T>
void write_weights(const PosteriorJob<T>& job, PosteriorBlock<T>& b, int64_t begin, int64_t count) {
  const Components<T>& c = *job.components;
  const int64_t stride = (c.k + W<T> - 1) / W<T> * W<T>;
  for (int64_t start = 0; start < count; start += W<T>) {
    for (int64_t first = 0; first < c.k; first += kComponents<T>) {
      const Vec<T> top = at(b.tops + first / kComponents<T> * B<T> + start);
      const Vec<T> share = exponential(top - at(b.top + start)) / at(b.sum + start);
      for (int64_t k = first; k < c.k && k < first + kComponents<T>; k += W<T>) {
        Vec<T> value[W<T>];
        for (int i = 0; i < W<T>; ++i) value[i] = at(b.kept + (k + i) * B<T> + start) * share;
        transpose_steps<T, 1>(value);
        for (int i = 0; i < W<T>; ++i) at(b.rows + i * stride + k) = value[i];
      }
    }
    for (int64_t i = 0; i < W<T> && start + i < count; ++i) {
      T* to = job.weights + (begin + start + i) * c.k_all;
      if (c.k == c.k_all) {
        stream_row(b.rows + i * stride, c.k, to);
        continue;
      }
      for (int64_t k = 0; k < c.k_all; ++k) to[k] = 0 * b.sum[start + i];  // NaN in a non-finite row
      for (int64_t k = 0; k < c.k; ++k) to[c.index[k]] = b.rows[i * stride + k];
    }
  }
  drain();
}

// Row i where it must be done again, and the outputs of one number per row where not.
template <class T>
void finish_row(const PosteriorJob<T>& job, const PosteriorBlock<T>& b, const Verdict<T>& verdict, int64_t i,
                int64_t lane) {
  const Components<T>& c = *job.components;
  const T* x = job.x + i * c.d;
  // a non-finite row has given non-finite sums, and so non-finite outputs
  if (b.exact[lane] && is_finite(x, c.d)) {
    for (int64_t j = 0; !verdict.collapsed[lane] && j < c.stride; ++j) b.centred[j] = b.points[j * B<T> + lane];
    const Point<T> point{x,
                         job.hvp ? job.v + i * c.d : nullptr,
                         b.centred,
                         b.alpha[lane],
                         b.std[lane],
                         b.leader[lane],
                         double(b.top[lane]),
                         verdict.window[lane],
                         verdict.collapsed[lane]};
    refine_row(job, i, point, b.scratch);
    return;
  }
  if (job.trace) job.trace[i] = b.second[lane];
  if (job.log_density)
    job.log_density[i] =
        T(density(c, x, b.alpha[lane], b.std[lane], b.leader[lane], __builtin_log(double(b.sum[lane]))));
}

// Asks for the next rows (count, d) while the arithmetic goes on: a block's rows are too many streams for the hardware.
template <int write, class T>
void prefetch(const T* rows, int64_t count, int64_t d) {
  const int64_t bytes = (count < B<T> ? count : B<T>)*d * int64_t(sizeof(T));
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(rows) + at, write);
}

template <class T>
void posterior(const PosteriorJob<T>& job, Work& work, Arena& arena) {
  const Components<T>& c = *job.components;
  PosteriorBlock<T> b = make_block(job, arena);
  Verdict<T> verdict;
  const double constant = error_constant(c.d), margin = __builtin_log(double(c.k)) + Simd<T>::negligible;
  // outputs that lose digits where one component has all the weight
  const bool differences = job.trace || job.hvp || (job.score && !kFused);
  const bool near = B<T> * c.d * int64_t(sizeof(T)) <= 32768;
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      const int64_t count = end - begin < B<T> ? end - begin : B<T>;
      load_block(job, begin, count, b);
      if (near && begin + count < end) prefetch<0>(job.x + (begin + count) * c.d, end - begin - count, c.d);
      if (near && job.score) prefetch<1>(job.score + begin * c.d, count, c.d);
      stream(job, b);
      judge(c, b, constant, margin, verdict);
      for (int lane = 0; lane < B<T>; ++lane)
        b.exact[lane] = !verdict.cheap[lane] || (differences && verdict.collapsed[lane]);
      if (job.score) write_rows<Output::score>(c, b, verdict, begin, count, job.score);
      if (job.posterior_mean) write_rows<Output::posterior_mean>(c, b, verdict, begin, count, job.posterior_mean);
      if (job.hvp) write_rows<Output::hvp>(c, b, verdict, begin, count, job.hvp);
      if (job.trace) finish_trace(c, verdict, b);
      if (job.weights) write_weights(job, b, begin, count);
      for (int64_t lane = 0; lane < count; ++lane)
        if (b.exact[lane] || job.trace || job.log_density) finish_row(job, b, verdict, begin + lane, lane);
    }
  }
}

}  // namespace flowfast::FLOWFAST_ISA
