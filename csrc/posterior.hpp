// Posterior weights, log-density, score, posterior mean, covariance trace and Hessian-vector product of a block of
// points in one streaming pass over tiles of components, with logits in centred expanded form. What may be used of it,
// and what is done again exactly, is decided in screen.hpp.
#pragma once
#include "refine.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

// Error of project() in units of u |row| |z|: partial sums of kChunk terms, three standard deviations of their
// rounding.
inline double error_constant(int64_t d) {
  return __builtin_sqrt(double(d < kChunk ? d : kChunk)) + __builtin_sqrt(double(d) / kChunk) + 1;
}

template <class T>
struct PosteriorBlock {
  T *centred, *points, *directions;  // (B, stride) x - alpha center;  (d, B) the same in lanes;  (d, B) v in lanes
  T *tile, *through_tile, *kept;     // (kComponents, B) logits, then weights;  weights times m_k.v;  (k_pad, B) logits
  T *mean, *through;                 // (stride, B) sum e_k m_k;  sum e_k (m_k.v) m_k
  T *result, *tile_wide;             // (B, stride) an output as rows;  (stride, B) the same in lanes
  double* scratch;                   // (2 d + k,)
  double alpha[B<T>], std[B<T>];
  alignas(kVectorBytes) T norm[B<T>];  // |x - alpha center|
  alignas(kVectorBytes) T top[B<T>], second_top[B<T>], sum[B<T>], second[B<T>], along[B<T>];
  alignas(kVectorBytes) int64_t leader[B<T>];
  bool exact[B<T>];  // row is done by refine_row
};

template <class T>
PosteriorBlock<T> make_block(const PosteriorJob<T>& job, Arena& arena) {
  const Components<T>& c = *job.components;
  PosteriorBlock<T> b{};
  b.centred = take<T>(arena, B<T> * c.stride);
  b.points = take<T>(arena, B<T> * c.stride);
  b.directions = job.hvp ? take<T>(arena, B<T> * c.stride) : nullptr;
  b.tile = take<T>(arena, B<T> * kComponents<T>);
  b.through_tile = take<T>(arena, B<T> * kComponents<T>);
  b.kept = job.weights ? take<T>(arena, B<T> * (c.k_pad + W<T>)) : nullptr;
  b.mean = take<T>(arena, B<T> * c.stride);
  b.through = take<T>(arena, B<T> * c.stride);
  b.result = take<T>(arena, B<T> * c.stride);
  b.tile_wide = take<T>(arena, B<T> * c.stride);
  b.scratch = take<double>(arena, 2 * c.d + c.k);
  return b;
}

// Rows begin .. begin + count - 1 into the block; lanes beyond count repeat the last row.
template <class T>
void load_block(const PosteriorJob<T>& job, int64_t begin, int64_t count, PosteriorBlock<T>& b) {
  const Components<T>& c = *job.components;
  for (int64_t lane = 0; lane < B<T>; ++lane) {
    const int64_t i = begin + (lane < count ? lane : count - 1);
    b.alpha[lane] = job.alpha[i * job.alpha_step];
    b.std[lane] = job.std[i * job.std_step];
    T* __restrict row = b.centred + lane * c.stride;
    const T* __restrict x = job.x + i * c.d;
    const double* __restrict center = c.center;
    const double alpha = b.alpha[lane];
    for (int64_t j = 0; j < c.d; ++j) row[j] = T(double(x[j]) - alpha * center[j]);
    for (int64_t j = c.d; j < c.stride; ++j) row[j] = 0;
    if (!job.hvp) continue;
    T* direction = b.result + lane * c.stride;
    for (int64_t j = 0; j < c.d; ++j) direction[j] = job.v[i * c.d + j];
  }
  rows_to_lanes(b.centred, c.stride, b.points);
  for (int p = 0; p < P; ++p) {
    Vec<T> square{};
    for (int64_t j = p * W<T>; j < c.d * B<T>; j += B<T>) square += at(b.points + j) * at(b.points + j);
    at(b.norm + p * W<T>) = square_root(square);
  }
  if (job.hvp) rows_to_lanes(b.result, c.stride, b.directions);
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

// (count, B): along_k = m_k.v, then tile <- weight * along; returns nothing, adds to the lane sums.
template <class T>
void add_direction(const Components<T>& c, int64_t first, int64_t count, const PosteriorBlock<T>& b, Vec<T>* along) {
  project(c.rows + first * c.stride, c.stride, count, b.directions, c.d, b.through_tile);
  for (int64_t k = 0; k < count; ++k)
    for (int p = 0; p < P; ++p) {
      Vec<T>& value = at(b.through_tile + k * B<T> + p * W<T>);
      value *= at(b.tile + k * B<T> + p * W<T>);
      along[p] += value;
    }
}

// The pass over all components.
template <class T>
void stream(const PosteriorJob<T>& job, PosteriorBlock<T>& b) {
  const Components<T>& c = *job.components;
  const bool means = job.score || job.posterior_mean || job.trace || job.hvp;
  Vec<T> gain[P], ratio[P], second[P] = {}, along[P] = {}, scale[P];
  for (int lane = 0; lane < B<T>; ++lane) {
    gain[lane / W<T>][lane % W<T>] = T(b.alpha[lane] / (b.std[lane] * b.std[lane]));
    ratio[lane / W<T>][lane % W<T>] = T(b.alpha[lane]);
  }
  for (int64_t j = 0; j < c.stride * B<T>; ++j) b.mean[j] = 0;
  for (int64_t j = 0; job.hvp && j < c.stride * B<T>; ++j) b.through[j] = 0;
  Softmax<T> softmax(T(Simd<T>::negligible + __builtin_log(double(c.k_pad))));
  TopTwo<T> best;
  int live[kComponents<T>];
  for (int64_t first = 0; first < c.k_pad; first += kComponents<T>) {
    const int64_t count = c.k_pad - first < kComponents<T> ? c.k_pad - first : kComponents<T>;
    T* tile = b.kept ? b.kept + first * B<T> : b.tile;
    project(c.rows + first * c.stride, c.stride, count, b.points, c.d, tile);
    logits(c, first, count, gain, ratio, tile);
    best.add(tile, first, count);
    for (int64_t j = 0; b.kept && j < count * B<T>; ++j) b.tile[j] = tile[j];
    const int n_live = weigh(softmax, b.tile, count, scale, live);
    if (!means) continue;
    rescale(b.mean, c.stride, scale);
    accumulate(c.rows + first * c.stride, c.stride, live, n_live, b.tile, c.stride, b.mean);
    for (int p = 0; p < P; ++p) {
      second[p] *= scale[p];
      along[p] *= scale[p];
      for (int64_t k = 0; k < count; ++k) second[p] += at(b.tile + k * B<T> + p * W<T>) * c.half_norms[first + k];
    }
    if (!job.hvp) continue;
    rescale(b.through, c.stride, scale);
    add_direction(c, first, count, b, along);
    accumulate(c.rows + first * c.stride, c.stride, live, n_live, b.through_tile, c.stride, b.through);
  }
  for (int p = 0; p < P; ++p) {
    at(b.top + p * W<T>) = best.first[p];
    at(b.second_top + p * W<T>) = best.second[p];
    at(b.sum + p * W<T>) = softmax.sum[p];
    at(b.second + p * W<T>) = second[p];
    at(b.along + p * W<T>) = along[p];
    for (int lane = 0; lane < W<T>; ++lane) b.leader[p * W<T> + lane] = best.leader[p][lane];
  }
}

}  // namespace flowfast::FLOWFAST_ISA
