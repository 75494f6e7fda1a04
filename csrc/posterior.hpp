// One streaming pass over panels of components for a block of points, with logits in centred expanded form. The pass
// leaves a bound on the error of each point's logits; where it exceeds the contract, or where cancellation would show
// in the output, refine_row does the row again. The contract, for every x:
//   error <= max(1e-10, 64 eps (1 + alpha max |m| / s)), in units of sqrt(E |x - m|^2) / s^2 for the score, of
//   (1 / s^2 + tr C / s^4) |v| for the Hessian-vector product, of s^2 / alpha^2 + tr C for the trace, of 1 for
//   weights and log-density.
#pragma once
#include "refine.hpp"
#include "softmax.hpp"

namespace flowfast::FLOWFAST_ISA {

// Error of project() in units of u |row| |point|: partial sums of kChunk terms, three standard deviations of their
// rounding.
inline double error_constant(int64_t d) {
  return __builtin_sqrt(double(d < kChunk ? d : kChunk)) + __builtin_sqrt(double(d) / kChunk) + 1;
}

// Errors in units of u = eps / 2, as functions of rho = alpha max |m - center| / s and xi = |x - alpha center| / s.
// Error the contract allows to logits.
template <class T, class V>
inline V allowed(V rho) {
  return larger(128 * (1 + rho), V{} + (sizeof(T) == sizeof(double) ? T(2e5) : T(0)));
}
// A component so far below the largest logit has no weight at the precision of T, given the logits' error.
template <class T>
inline double harmless_gap(double error, int64_t k) {
  return Simd<T>::eps * error + __builtin_log(double(k)) + Simd<T>::negligible;
}

// The two largest logits and the component of the larger one.
template <class T>
struct Largest {
  Vec<T> first[P], second[P];
  Int<T> leader[P];
  Largest() {
    for (int p = 0; p < P; ++p) first[p] = second[p] = all(-Simd<T>::infinity), leader[p] = Int<T>{};
  }
};

// B points in lanes and what the pass knows of them.
template <class T>
struct Block {
  T *points, *directions, *mean, *through;  // (stride, B) x - alpha center; v; sum e_k m_k; sum e_k (m_k.v) m_k
  const T *x[B<T>], *v[B<T>];               // the rows; those beyond the last repeat it
  double alpha[B<T>], std[B<T>];
  alignas(kVectorBytes) T ratio[B<T>], rest[B<T>], rate[B<T>],
      gain[B<T>];    // alpha = ratio + rest, 1 / std, alpha / std^2 / ln 2
  Vec<T> square[P];  // |x - alpha center|^2
  Softmax<T> softmax;
  Largest<T> largest;
  Vec<T> second[P], along[P];  // sum e_k |m_k|^2 / 2; sum e_k m_k.v
  int64_t begin, count;
  bool used;
};

// Memory shared by the blocks of a worker.
template <class T>
struct Scratch {
  T *tile, *through, *centred;  // (kPanel, B) logits, then weights; weights times m_k.v; (stride,) one point
  double* sums;                 // (2 d + k,)
  Scratch(const Components<T>& c, Arena& arena)
      : tile(take<T>(arena, 2 * kPanel<T> * B<T>)),
        through(tile + kPanel<T> * B<T>),
        centred(take<T>(arena, c.stride)),
        sums(take<double>(arena, 2 * c.d + c.k)) {}
};

template <class T>
void enter_block(const PosteriorJob<T>& job, int64_t begin, int64_t end, Block<T>& b) {
  const Components<T>& c = *job.components;
  b.begin = begin, b.count = end - begin < B<T> ? end - begin : B<T>;
  for (int lane = 0; lane < B<T>; ++lane) {
    const int64_t i = begin + (lane < b.count ? lane : b.count - 1);
    b.x[lane] = job.x + i * c.d, b.v[lane] = job.v ? job.v + i * c.d : nullptr;
    b.alpha[lane] = job.alpha[i * job.alpha_step], b.std[lane] = job.std[i * job.std_step];
  }
  for (int lane = 0; lane < B<T> && (job.alpha_step || job.std_step || !b.used); ++lane) {
    b.ratio[lane] = T(b.alpha[lane]), b.rest[lane] = T(b.alpha[lane] - double(b.ratio[lane]));
    b.rate[lane] = T(1 / b.std[lane]), b.gain[lane] = T(kLog2e * b.alpha[lane] / (b.std[lane] * b.std[lane]));
  }
  rows_to_lanes(b.x, c.d, b.points, [center = c.center, alpha = b.ratio, rest = b.rest](int l, int64_t j, Vec<T> row) {
    return centred_row(center + j, alpha[l], rest[l], row);
  });
  if (job.output == Output::hvp) rows_to_lanes(b.v, c.d, b.directions, [](int, int64_t, Vec<T> row) { return row; });
  Vec<T> sum[kRows][P] = {};
  const T* points = b.points;
  for (int64_t j = 0; j < c.stride; j += kRows)
    for (int i = 0; i < kRows * P; ++i) {
      const Vec<T> value = at(points + j * B<T> + i * W<T>);
      sum[i / P][i % P] += value * value;
    }
  b.softmax = Softmax<T>(), b.largest = Largest<T>(), b.used = true;
  for (int p = 0; p < P; ++p) {
    b.square[p] = (sum[0][p] + sum[1][p]) + (sum[2][p] + sum[3][p]);
    b.second[p] = b.along[p] = Vec<T>{};
  }
}

template <class T>
void add_panel(const PosteriorJob<T>& job, const Panel<T>& panel, T window, const Scratch<T>& scratch, Block<T>& b,
               Ahead<T> ahead) {
  const Components<T>& c = *job.components;
  Vec<T> scales[P], *const scale = panel.first > 0 ? scales : nullptr;
  int live[kPanel<T>];
  project(
      panel, c.d, b.points, scratch.tile,
      [&](int64_t k, auto& tile) {
        Largest<T> now = b.largest;
#pragma GCC unroll 16
        for (int t = 0; t < int(sizeof(tile) / sizeof(tile[0])); ++t) {
          const Vec<T> half_norm = all(panel.half_norms[k + t]), log_weight = all(panel.log_weights[k + t]);
          const Int<T> here = Int<T>{} + Index<T>(panel.first + k + t);
          for (int p = 0; p < P; ++p) {
            const Vec<T> logit = at(b.gain + p * W<T>) * (tile[t][p] - at(b.ratio + p * W<T>) * half_norm) + log_weight;
            now.leader[p] = logit > now.first[p] ? here : now.leader[p];
            now.second[p] = larger(smaller(logit, now.first[p]), now.second[p]);
            now.first[p] = larger(logit, now.first[p]);
            tile[t][p] = logit;
          }
        }
        b.largest = now;
      },
      ahead);
  const int n_live = b.softmax.weigh(b.largest.first, window, scratch.tile, panel.count, scales, live);
  if (job.output == Output::log_density) return;
  accumulate(panel, live, n_live, scratch.tile, b.mean, scale);
  for (int p = 0; job.output == Output::trace && p < P; ++p) {
    b.second[p] *= scales[p];
    for (int64_t k = 0; k < panel.count; ++k)
      b.second[p] += at(scratch.tile + k * B<T> + p * W<T>) * panel.half_norms[k];
  }
  if (job.output != Output::hvp) return;
  for (int p = 0; p < P; ++p) b.along[p] *= scales[p];
  project(panel, c.d, b.directions, scratch.through, [&](int64_t k, auto& tile) {
    for (int i = 0; i < int(sizeof(tile) / sizeof(Vec<T>)); ++i) {
      Vec<T>& dot = tile[i / P][i % P];
      dot *= at(scratch.tile + k * B<T> + i * W<T>);
      b.along[i % P] += dot;
    }
  });
  accumulate(panel, live, n_live, scratch.through, b.through, scale);
}

// mean (stride, B) <- the output's columns, from the sums of the pass; marks the lanes in which a score is a difference
// of nearly equal numbers.
template <Output output, class T>
void finish_columns(const Components<T>& c, double radius, const Vec<T>* allow, const Block<T>& b, Int<T>* again) {
  for (int p = 0; p < P; ++p) {
    const Vec<T> share = 1 / b.softmax.sum[p], rate = at(b.rate + p * W<T>), inverse = rate * rate;
    const Vec<T> alpha = at(b.ratio + p * W<T>), ratio = alpha * share, along = b.along[p] * share;
    const Vec<T> curvature = alpha * inverse * alpha * inverse;
    Vec<T> gap2[kRows] = {};
    T *const means = b.mean, *const points = b.points;  // what is read through a reference is read at every turn
    for (int64_t j = 0, stride = c.stride; j < stride; j += kRows)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const int64_t from = (j + i) * B<T> + p * W<T>;
        Vec<T>& mean = at(means + from);
        if constexpr (output == Output::score) {
          const Vec<T> gap = ratio * mean - at(points + from);
          gap2[i] += gap * gap;
          mean = gap * inverse;
        } else if constexpr (output == Output::posterior_mean) {
          mean = mean * share + c.center[j + i];
        } else {
          mean *= share;
          mean = curvature * (at(b.through + from) * share - along * mean) - at(b.directions + from) * inverse;
        }
      }
    if constexpr (output == Output::score) {
      const Vec<T> reach2 = alpha * alpha * T(radius * radius) + b.square[p];
      again[p] |= ~(32 * reach2 <= allow[p] * allow[p] * ((gap2[0] + gap2[1]) + (gap2[2] + gap2[3])));
    }
  }
}

// Writes what the pass gives; marks the lanes in which it is a difference of nearly equal numbers.
template <class T>
void write_block(const PosteriorJob<T>& job, double radius, const Vec<T>* allow, const Block<T>& b, Int<T>* again) {
  const Components<T>& c = *job.components;
  if (job.output == Output::log_density) {
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t p = i / W<T>, q = i % W<T>;
      const double log_sum = __builtin_log(double(b.softmax.sum[p][q]));
      job.out[b.begin + i] = T(density(c, b.x[i], b.alpha[i], b.std[i], b.largest.leader[p][q], log_sum));
    }
  } else if (job.output == Output::trace) {
    for (int p = 0; p < P; ++p) {
      const Vec<T> share = 1 / b.softmax.sum[p];
      Vec<T> norm2{};
      for (int64_t j = p * W<T>; j < c.stride * B<T>; j += B<T>) {
        const Vec<T> mean = at(b.mean + j) * share;
        norm2 += mean * mean;
      }
      const Vec<T> trace = 2 * share * b.second[p] - norm2,
                   noise = 1 / (at(b.ratio + p * W<T>) * at(b.rate + p * W<T>) * at(b.ratio + p * W<T>) *
                                at(b.rate + p * W<T>));
      again[p] |= ~(8 * T(radius * radius) <= allow[p] * (trace + noise));
      if (b.count > p * W<T>) store(trace, job.out + b.begin + p * W<T>, b.count - p * W<T>);
    }
  } else {
    T* rows[B<T>];
    for (int lane = 0; lane < B<T>; ++lane) rows[lane] = job.out + (b.begin + lane) * c.d;
    if (job.output == Output::score) finish_columns<Output::score>(c, radius, allow, b, again);
    if (job.output == Output::posterior_mean) finish_columns<Output::posterior_mean>(c, radius, allow, b, again);
    if (job.output == Output::hvp) finish_columns<Output::hvp>(c, radius, allow, b, again);
    lanes_to_rows(b.mean, c.d, b.count, rows, job.past_caches);
  }
}

template <class T>
void leave_block(const PosteriorJob<T>& job, double radius, const Scratch<T>& scratch, const Block<T>& b) {
  const Components<T>& c = *job.components;
  const double constant = error_constant(c.d);
  // outputs that lose digits where one component has all the weight
  const bool differences =
      job.output == Output::trace || job.output == Output::hvp || (job.output == Output::score && !kFused);
  Vec<T> allow[P];
  Int<T> again[P];
  for (int p = 0; p < P; ++p) {
    const Vec<T> rho = magnitude(at(b.ratio + p * W<T>)) * T(radius) * at(b.rate + p * W<T>),
                 xi = at(b.rate + p * W<T>), sum = b.softmax.sum[p];
    allow[p] = allowed<T>(rho);
    const Vec<T> room = allow[p] - 2 * rho * rho - 16;  // constant xi rho must fit in
    again[p] = ~((room >= 0) & (T(constant * constant) * rho * rho * (b.square[p] * xi * xi) <= room * room));
    again[p] |= sum - sum != 0;
    const Vec<T> window = T(kLog2e * Simd<T>::eps) * allow[p] + T(kLog2e * harmless_gap<T>(0, c.k));
    if (differences) again[p] |= b.largest.first[p] - b.largest.second[p] > window;
  }
  write_block(job, radius, allow, b, again);
  Int<T> some{};
  for (int p = 0; p < P; ++p) some |= again[p];
  for (int lane = 0; any(some) && lane < b.count; ++lane) {
    const int p = lane / W<T>, q = lane % W<T>;
    if (!again[p][q] || !is_finite(b.x[lane], c.d)) continue;  // a non-finite row has given non-finite outputs
    const double rho = __builtin_fabs(b.alpha[lane]) * radius / b.std[lane];
    const double xi = __builtin_sqrt(double(b.square[p][q])) / b.std[lane];
    const double error = constant * xi * rho + 2 * rho * rho + 16, most = double(allow[p][q]);
    const double window = harmless_gap<T>(error > most ? error : most, c.k);
    for (int64_t j = 0; j < c.stride; ++j) scratch.centred[j] = b.points[j * B<T> + lane];
    const bool collapsed = double(b.largest.first[p][q] - b.largest.second[p][q]) > kLog2e * window;
    refine_row(
        job, b.begin + lane,
        {b.x[lane], b.v[lane], scratch.centred, b.alpha[lane], b.std[lane], b.largest.leader[p][q], window, collapsed},
        scratch.sums);
  }
}

template <class T>
void posterior(const PosteriorJob<T>& job, Work& work, Arena& arena) {
  const Components<T>& c = *job.components;
  const Scratch<T> scratch(c, arena);
  const T window = T(kLog2e * harmless_gap<T>(0, c.k));
  Panels<T> panels(c, arena);
  const int64_t group = c.group, wide = c.stride * B<T>;  // blocks that share the reading of a panel
  Block<T>* blocks = take<Block<T>>(arena, group);
  T* memory = take<T>(arena, group * wide * (job.output == Output::hvp ? 4 : 2));
  for (int64_t i = 0; i < group; ++i) {
    blocks[i].used = false;
    blocks[i].points = memory + i * wide, blocks[i].mean = memory + (group + i) * wide;
    if (job.output == Output::hvp)
      blocks[i].directions = blocks[i].mean + group * wide, blocks[i].through = blocks[i].directions + group * wide;
  }
  const bool write_soon = job.output != Output::log_density && job.output != Output::trace && !job.past_caches;
  int64_t begin, end;
  while (next_rows(work, begin, end))
    for (; begin < end; begin += group * B<T>) {
      int64_t used = 0;
      for (; used < group && begin + used * B<T> < end; ++used)
        enter_block(job, begin + used * B<T>, end, blocks[used]);
      if (group == 1 && write_soon) prefetch<1>(job.out + begin * c.d, blocks[0].count * c.d);
      const int64_t next = begin + used * B<T>, left = end - next;  // rows to ask for while these are worked on
      const Ahead<T> rows{job.x + next * c.d, (left < B<T> ? left : B<T>)*c.d};
      for (int64_t first = 0; first < c.k; first += kPanel<T>) {
        const Panel<T> panel = panels.get(first);
        for (int64_t i = 0; i < used; ++i)
          add_panel(job, panel, window, scratch, blocks[i], first || group > 1 ? panels.ahead(first, i, used) : rows);
      }
      for (int64_t i = 0; i < used; ++i) leave_block(job, panels.radius(), scratch, blocks[i]);
    }
  drain();
}

}  // namespace flowfast::FLOWFAST_ISA
