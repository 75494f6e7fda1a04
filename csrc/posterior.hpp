// Posterior weights, log-density, score, posterior mean, covariance trace and Hessian-vector product of a block of
// points in one streaming pass over tiles of components, with logits in centred expanded form. What may be used of it,
// and what is done again exactly, is decided in screen.hpp.
#pragma once
#include <type_traits>

#include "refine.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

// Error of project() in units of u |row| |z|: partial sums of kChunk terms, three standard deviations of their
// rounding.
inline double error_constant(int64_t d) {
  return __builtin_sqrt(double(d < kChunk ? d : kChunk)) + __builtin_sqrt(double(d) / kChunk) + 1;
}

template <class T>
using Index = std::remove_reference_t<decltype(std::declval<Int<T>&>()[0])>;

template <class T>
struct PosteriorBlock {
  T *points, *directions;  // (stride, B) x - alpha center in lanes;  (stride, B) v in lanes
  T *tile, *through_tile;  // (kComponents, B) logits, then weights;  weights times m_k.v
  T *kept, *tops;          // (k_pad, B) weights relative to their tile's maximum;  (tiles, B) those maxima
  T* rows;                 // (W, k) weights as rows, padded to whole registers
  T *mean, *through;       // (stride, B) sum e_k m_k;  sum e_k (m_k.v) m_k
  T* centred;              // (stride,) one point of `points`
  double* scratch;         // (2 d + k,)
  double alpha[B<T>], std[B<T>], xi[B<T>];                         // xi = |x - alpha center| / std
  alignas(kVectorBytes) T ratio[B<T>], inverse[B<T>], gain[B<T>];  // alpha, 1 / std^2, alpha / std^2
  alignas(kVectorBytes) T top[B<T>], second_top[B<T>], sum[B<T>], second[B<T>], along[B<T>];
  alignas(kVectorBytes) Index<T> leader[B<T>];
  bool exact[B<T>];  // row is done by refine_row
};

template <class T>
PosteriorBlock<T> make_block(const PosteriorJob<T>& job, Arena& arena) {
  const Components<T>& c = *job.components;
  const int64_t wide = B<T> * c.stride, tile = B<T> * kComponents<T>;
  const int64_t tiles = (c.k_pad + kComponents<T> - 1) / kComponents<T>;
  T* memory = take<T>(arena, wide * (job.hvp ? 4 : 2) + c.stride + 2 * tile +
                                 (job.weights ? tiles * (tile + B<T> + kComponents<T> * W<T>) : 0));
  const auto next = [&memory](int64_t count) { return (memory += count) - count; };
  PosteriorBlock<T> b{};
  b.points = next(wide), b.mean = next(wide), b.tile = next(tile), b.through_tile = next(tile);
  b.centred = next(c.stride);
  if (job.hvp) b.directions = next(wide), b.through = next(wide);
  if (job.weights)
    b.kept = next(tiles * tile), b.tops = next(tiles * B<T>), b.rows = next(tiles * kComponents<T> * W<T>);
  b.scratch = take<double>(arena, 2 * c.d + c.k);
  return b;
}

// lanes (stride, B) <- rows (., d) begin .. begin + count - 1 less alpha center; lanes beyond count repeat the last
// row.
template <class T>
void load_lanes(const T* rows, int64_t begin, int64_t count, const Components<T>& c, const double* alpha, T* lanes) {
  alignas(kVectorBytes) T square[W<T> * W<T>];
  for (int64_t start = 0; start < B<T>; start += W<T>)
    for (int64_t j = 0; j < c.stride; j += W<T>) {
      const int64_t width = c.d - j < W<T> ? c.d - j : W<T>;
      const double* __restrict center = c.center + j;
      for (int64_t i = 0; i < W<T>; ++i) {
        const int64_t lane = start + i < count ? start + i : count - 1;
        const T* __restrict row = rows + (begin + lane) * c.d + j;
        T* __restrict to = square + i * W<T>;
        const double scale = alpha[lane];
        if (width == W<T>)
          for (int half = 0; half < W<T>; half += W<T> / 2)
            for (int l = half; l < half + W<T> / 2; ++l) to[l] = T(double(row[l]) - scale * center[l]);
        else
          for (int l = 0; l < W<T>; ++l) to[l] = l < width ? T(double(row[l]) - scale * center[l]) : T(0);
      }
      transpose_square(square, W<T>, lanes + j * B<T> + start, B<T>);
    }
}

template <class T>
void load_block(const PosteriorJob<T>& job, int64_t begin, int64_t count, PosteriorBlock<T>& b) {
  const Components<T>& c = *job.components;
  for (int64_t lane = 0; lane < B<T>; ++lane) {
    const int64_t i = begin + (lane < count ? lane : count - 1);
    b.alpha[lane] = job.alpha[i * job.alpha_step];
    b.std[lane] = job.std[i * job.std_step];
  }
  for (int lane = 0; lane < B<T>; ++lane) {
    const double inverse = 1 / (b.std[lane] * b.std[lane]);
    b.ratio[lane] = T(b.alpha[lane]), b.inverse[lane] = T(inverse), b.gain[lane] = T(b.alpha[lane] * inverse);
  }
  load_lanes(job.x, begin, count, c, b.alpha, b.points);
  alignas(kVectorBytes) T square[B<T>];
  Vec<T> sum[4][P] = {};
  for (int64_t j = 0; j < c.stride; j += 4)
    for (int i = 0; i < 4 * P; ++i) {
      const Vec<T> value = at(b.points + j * B<T> + i * W<T>);
      sum[i / P][i % P] += value * value;
    }
  for (int p = 0; p < P; ++p) at(square + p * W<T>) = (sum[0][p] + sum[1][p]) + (sum[2][p] + sum[3][p]);
  for (int lane = 0; lane < B<T>; ++lane) b.xi[lane] = __builtin_sqrt(double(square[lane])) / b.std[lane];
  const double none[B<T>] = {};
  if (job.hvp) load_lanes(job.v, begin, count, c, none, b.directions);
}

// The two largest logits so far and the component of the larger one.
template <class T>
struct TopTwo {
  Vec<T> first[P], second[P];
  Int<T> leader[P];
  TopTwo() {
    for (int p = 0; p < P; ++p) first[p] = second[p] = all(-Simd<T>::infinity), leader[p] = Int<T>{};
  }
  void add(const T* tile, int64_t first_k, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      for (int p = 0; p < P; ++p) {
        const Vec<T> value = at(tile + k * B<T> + p * W<T>);
        const Int<T> above = value > first[p];
        second[p] = above ? first[p] : larger(value, second[p]);
        first[p] = above ? value : first[p];
        leader[p] = above ? Int<T>{} + decltype(leader[p][0] + 0)(first_k + k) : leader[p];
      }
  }
};

// through_tile (count, B) = weight_k m_k.v, added to along too
template <class T>
void add_direction(const Components<T>& c, int64_t first, int64_t count, const T* weights, const PosteriorBlock<T>& b,
                   Vec<T>* along) {
  project(c.rows + first * c.stride, c.stride, count, b.directions, c.d, b.through_tile);
  for (int64_t k = 0; k < count; ++k)
    for (int p = 0; p < P; ++p) {
      Vec<T>& value = at(b.through_tile + k * B<T> + p * W<T>);
      value *= at(weights + k * B<T> + p * W<T>);
      along[p] += value;
    }
}

// The pass over all components.
template <class T>
void stream(const PosteriorJob<T>& job, PosteriorBlock<T>& b) {
  const Components<T>& c = *job.components;
  const bool means = job.score || job.posterior_mean || job.trace || job.hvp;
  Vec<T> gain[P], ratio[P], second[P] = {}, along[P] = {}, scale[P];
  for (int p = 0; p < P; ++p) gain[p] = at(b.gain + p * W<T>), ratio[p] = at(b.ratio + p * W<T>);
  Softmax<T> softmax(job.weights ? Simd<T>::infinity : T(Simd<T>::negligible + __builtin_log(double(c.k_pad))));
  TopTwo<T> best;
  int live[kComponents<T>];
  const int64_t used = (c.k + 3) / 4 * 4;
  for (int64_t first = 0; first < used; first += kComponents<T>) {
    const int64_t count = used - first < kComponents<T> ? used - first : kComponents<T>;
    T* tile = b.kept ? b.kept + first * B<T> : b.tile;
    project(c.rows + first * c.stride, c.stride, count, b.points, c.d, tile);
    logits(c, first, count, gain, ratio, tile);
    best.add(tile, first, count);
    const int n_live = weigh(softmax, tile, count, scale, live);
    for (int p = 0; b.kept && p < P; ++p) at(b.tops + first / kComponents<T> * B<T> + p * W<T>) = softmax.top[p];
    if (!means) continue;
    if (first) rescale(b.mean, c.stride, scale);
    accumulate(c.rows + first * c.stride, c.stride, live, n_live, tile, c.stride, b.mean, first == 0);
    for (int p = 0; job.trace && p < P; ++p) {
      second[p] *= scale[p];
      for (int64_t k = 0; k < count; ++k) second[p] += at(tile + k * B<T> + p * W<T>) * c.half_norms[first + k];
    }
    if (!job.hvp) continue;
    if (first) rescale(b.through, c.stride, scale);
    for (int p = 0; p < P; ++p) along[p] *= scale[p];
    add_direction(c, first, count, tile, b, along);
    accumulate(c.rows + first * c.stride, c.stride, live, n_live, b.through_tile, c.stride, b.through, first == 0);
  }
  for (int p = 0; p < P; ++p) {
    at(b.top + p * W<T>) = best.first[p];
    at(b.second_top + p * W<T>) = best.second[p];
    at(b.sum + p * W<T>) = softmax.sum[p];
    at(b.second + p * W<T>) = second[p];
    at(b.along + p * W<T>) = along[p];
    reinterpret_cast<Int<T>&>(b.leader[p * W<T>]) = best.leader[p];
  }
}

}  // namespace flowfast::FLOWFAST_ISA
