// Screen and refine. The streaming pass leaves a bound on the error of each point's logits; where it exceeds the
// contract, or where cancellation would show in the output, the row is done again by refine_row. The contract, for
// every x:
//   error <= max(1e-10, 64 eps (1 + alpha max |m| / s)), in units of sqrt(E |x - m|^2) / s^2 for the score, of
//   (1 / s^2 + tr C / s^4) |v| for the Hessian-vector product, of 1 for weights and log-density.
#pragma once
#include "posterior.hpp"

namespace flowfast::FLOWFAST_ISA {

// What the bound says about one lane.
struct Verdict {
  double limit, window;           // error the contract allows; gap below the maximum that cannot matter
  bool finite, cheap, collapsed;  // x is finite; the pass is accurate enough; one component has all the weight
};

template <class T>
Verdict judge(const Components<T>& c, const PosteriorBlock<T>& b, int lane, const T* x) {
  const double u = Simd<T>::eps / 2, std = b.std[lane];
  const double xi = b.norm[lane] / std, rho = __builtin_fabs(b.alpha[lane]) * c.radius / std;
  const double delta = u * (error_constant(c.d) * xi * rho + 2 * rho * rho + 16);
  Verdict verdict{};
  verdict.limit = 128 * u * (1 + rho);
  if (sizeof(T) == sizeof(double) && verdict.limit < 2e-11) verdict.limit = 2e-11;
  verdict.window = 2 * delta + __builtin_log(double(c.k)) + Simd<T>::negligible;
  verdict.finite = true;
  if (!(xi - xi == 0))
    for (int64_t j = 0; j < c.d; ++j) verdict.finite &= x[j] - x[j] == 0;
  verdict.cheap = delta <= verdict.limit && b.sum[lane] - b.sum[lane] == 0;
  verdict.collapsed = double(b.top[lane]) - double(b.second_top[lane]) > verdict.window;
  return verdict;
}

// Lanes that the pass cannot serve because their outputs are differences of nearly equal numbers.
template <class T>
void find_cancellation(const PosteriorJob<T>& job, PosteriorBlock<T>& b, const Verdict* verdicts) {
  const Components<T>& c = *job.components;
  alignas(kVectorBytes) T distance[B<T>], spread[B<T>];
  for (int p = 0; p < P; ++p) {
    Vec<T> alpha, gap2{}, norm2{};
    for (int lane = 0; lane < W<T>; ++lane) alpha[lane] = T(b.alpha[p * W<T> + lane]);
    const Vec<T> share = 1 / at(b.sum + p * W<T>);
    for (int64_t j = 0; j < c.d; ++j) {
      Vec<T>& mean = at(b.mean + j * B<T> + p * W<T>);
      mean *= share;
      const Vec<T> gap = alpha * mean - at(b.points + j * B<T> + p * W<T>);
      gap2 += gap * gap;
      norm2 += mean * mean;
    }
    at(distance + p * W<T>) = gap2;
    at(spread + p * W<T>) = 2 * share * at(b.second + p * W<T>) - norm2;
  }
  const double u = Simd<T>::eps / 2;
  for (int lane = 0; lane < B<T>; ++lane) {
    const double reach = __builtin_fabs(b.alpha[lane]) * c.radius + b.norm[lane], limit = verdicts[lane].limit;
    b.exact[lane] |= job.score && !(4 * u * reach <= limit * __builtin_sqrt(double(distance[lane])));
    b.exact[lane] |= job.trace && !(8 * u * c.radius * c.radius <= limit * double(spread[lane]));
    b.second[lane] = spread[lane];
  }
}

// result (B, d) <- the chosen vector output of the pass, as rows. b.mean holds the posterior mean by now.
enum class Output { score, posterior_mean, hvp };

template <class T>
void fill_result(const Components<T>& c, PosteriorBlock<T>& b, Output output) {
  T* lanes = b.tile_wide;
  for (int p = 0; p < P; ++p) {
    Vec<T> alpha, inverse;
    for (int lane = 0; lane < W<T>; ++lane) {
      const double std = b.std[p * W<T> + lane];
      alpha[lane] = T(b.alpha[p * W<T> + lane]), inverse[lane] = T(1 / (std * std));
    }
    const Vec<T> share = 1 / at(b.sum + p * W<T>), along = at(b.along + p * W<T>) * share;
    const Vec<T> curvature = alpha * inverse * alpha * inverse;
    for (int64_t j = 0; j < c.d; ++j) {
      const int64_t at_j = j * B<T> + p * W<T>;
      const Vec<T> mean = at(b.mean + at_j);
      Vec<T>& value = at(lanes + at_j);
      if (output == Output::score) value = (alpha * mean - at(b.points + at_j)) * inverse;
      if (output == Output::posterior_mean) value = mean;
      if (output == Output::hvp)
        value = curvature * (at(b.through + at_j) * share - along * mean) - at(b.directions + at_j) * inverse;
    }
  }
  lanes_to_rows(lanes, c.stride, b.result);
}

template <class T>
void write_output(const PosteriorJob<T>& job, PosteriorBlock<T>& b, int64_t begin, int64_t count, Output output,
                  T* out) {
  const Components<T>& c = *job.components;
  if (!out) return;
  fill_result(c, b, output);
  for (int64_t lane = 0; lane < count; ++lane) {
    if (b.exact[lane]) continue;
    const T* row = b.result + lane * c.stride;
    T* to = out + (begin + lane) * c.d;
    if (output == Output::posterior_mean)
      for (int64_t j = 0; j < c.d; ++j) to[j] = T(double(row[j]) + c.center[j]);
    else
      for (int64_t j = 0; j < c.d; ++j) to[j] = row[j];
  }
}

// weights (count, k_all) from the kept logits
template <class T>
void write_weights(const PosteriorJob<T>& job, PosteriorBlock<T>& b, int64_t begin, int64_t count) {
  const Components<T>& c = *job.components;
  for (int64_t k = 0; k < c.k_pad; ++k)
    for (int p = 0; p < P; ++p) {
      Vec<T>& value = at(b.kept + k * B<T> + p * W<T>);
      value = exponential(value - at(b.top + p * W<T>)) / at(b.sum + p * W<T>);
    }
  alignas(kVectorBytes) T rows[W<T> * W<T>];
  for (int64_t lane = 0; lane < count && c.k < c.k_all; ++lane)
    for (int64_t k = 0; k < c.k_all; ++k)
      job.weights[(begin + lane) * c.k_all + k] = 0 * b.sum[lane];  // NaN in a non-finite row
  for (int64_t k = 0; k < c.k; k += W<T>)
    for (int64_t start = 0; start < count; start += W<T>) {
      const int64_t width = c.k - k < W<T> ? c.k - k : W<T>;
      transpose_square(b.kept + k * B<T> + start, B<T>, rows, W<T>);
      for (int64_t lane = start; lane < count && lane < start + W<T>; ++lane) {
        T* to = job.weights + (begin + lane) * c.k_all;
        const T* from = rows + (lane - start) * W<T>;
        if (c.k == c.k_all)
          for (int64_t l = 0; l < width; ++l) to[k + l] = from[l];
        else
          for (int64_t l = 0; l < width; ++l) to[c.index[k + l]] = from[l];
      }
    }
}

template <class T>
void posterior(const PosteriorJob<T>& job, Work& work, Arena& arena) {
  const Components<T>& c = *job.components;
  PosteriorBlock<T> b = make_block(job, arena);
  Verdict verdicts[B<T>];
  const bool vectors = job.score || job.posterior_mean || job.trace || job.hvp || job.log_density;
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      const int64_t count = end - begin < B<T> ? end - begin : B<T>;
      load_block(job, begin, count, b);
      stream(job, b);
      for (int lane = 0; lane < B<T>; ++lane) {
        const int64_t i = begin + (lane < count ? lane : count - 1);
        verdicts[lane] = judge(c, b, lane, job.x + i * c.d);
        b.exact[lane] = !verdicts[lane].cheap || (vectors && verdicts[lane].collapsed);
      }
      find_cancellation(job, b, verdicts);
      if (job.weights) write_weights(job, b, begin, count);  // exact rows are overwritten below
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t i = begin + lane;
        const Verdict& verdict = verdicts[lane];
        const T* x = job.x + i * c.d;
        b.exact[lane] &= verdict.finite;  // a non-finite row has given non-finite sums, and so non-finite outputs
        if (b.exact[lane]) {
          const Point<T> point{x,
                               job.hvp ? job.v + i * c.d : nullptr,
                               b.centred + lane * c.stride,
                               b.alpha[lane],
                               b.std[lane],
                               b.leader[lane],
                               double(b.top[lane]),
                               verdict.window,
                               verdict.collapsed};
          refine_row(job, i, point, b.scratch);
        } else {
          if (job.trace) job.trace[i] = b.second[lane];
          if (job.log_density)
            job.log_density[i] =
                T(density(c, x, b.alpha[lane], b.std[lane], b.leader[lane], __builtin_log(double(b.sum[lane]))));
        }
      }
      write_output(job, b, begin, count, Output::score, job.score);
      write_output(job, b, begin, count, Output::posterior_mean, job.posterior_mean);
      write_output(job, b, begin, count, Output::hvp, job.hvp);
    }
  }
}

}  // namespace flowfast::FLOWFAST_ISA
