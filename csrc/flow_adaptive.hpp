// Embedded Runge-Kutta with one step size per trajectory. Lanes of a block advance independently: a finished lane is
// handed the next row, and no operation mixes lanes, so a trajectory's bits do not depend on its neighbours.
#pragma once
#include "flow_fixed.hpp"

namespace flowfast::FLOWFAST_ISA {

// e^(-1/5), 1e-30 <= e <= 1e30, to a few ulp: a guess from the exponent, then Newton steps y <- y (6 - e y^5) / 5.
template <class T>
Vec<T> inverse_fifth_root(Vec<T> e) {
  const T one_bits = sizeof(T) == 4 ? T(0x3f800000) : T(0x3ff0000000000000);
  const Vec<T> guess = T(1.2) * one_bits - T(0.2) * __builtin_convertvector(reinterpret_cast<Int<T>&>(e), Vec<T>);
  const Int<T> bits = __builtin_convertvector(guess, Int<T>);
  Vec<T> y = reinterpret_cast<const Vec<T>&>(bits);
  for (int i = 0; i < 5; ++i) {
    const Vec<T> square = y * y;
    y *= (6 - e * square * square * y) * T(0.2);
  }
  return y;
}

template <class T, class Form>
class Adaptive {
 public:
  Adaptive(const FlowJob<T>& job, Work& work, Arena& arena)
      : job_(job), work_(work), form_(job, arena), s_(job.stages), rows_(form_.rows()) {
    state_ = take<T>(arena, rows_ * B<T>), next_ = take<T>(arena, rows_ * B<T>);
    stage_ = take<T>(arena, rows_ * B<T>), y_ = take<T>(arena, job.components->stride);
    for (int64_t j = 0; j < s_; ++j) slopes_[j] = take<T>(arena, rows_ * B<T>);
    const double *nodes = job.tableau + s_ * s_, *weights = nodes + s_, *last = nodes - s_;
    same_as_last_ = nodes[s_ - 1] == 1 && weights[s_ - 1] == 0;
    for (int64_t j = 0; j < s_; ++j) same_as_last_ &= last[j] == weights[j];
  }

  void run() {
    while (true) {
      refill();
      if (idle_ == B<T>) return;
      if (any_lane(fresh_)) first_slope();
      attempt();
      decide();
      retire();
    }
  }

 private:
  using V = Vec<T>;
  using I = Int<T>;

  static bool any_lane(const I* mask) {
    I both{};
    for (int p = 0; p < P; ++p) both |= mask[p];
    return any(both);
  }

  // Puts row i into a lane; false if there is nothing to integrate (the output row is written).
  bool admit(int64_t i, int lane) {
    const Components<T>& c = *job_.components;
    const Ends<T> ends(job_, i);
    enter_row(job_, i, ends, y_);
    const double span = ends.r_to - ends.r_from;
    bool finite = span - span == 0 && ends.s_to - ends.s_to == 0;
    for (int64_t j = 0; j < c.d; ++j) finite &= y_[j] - y_[j] == 0;
    if (!finite || span == 0) {
      for (int64_t j = 0; !finite && j < c.d; ++j) y_[j] = T(__builtin_nan(""));
      leave_row(job_, i, ends, y_);
      job_.status[i] = finite ? 0 : 2, job_.attempts[i] = job_.evaluations[i] = 0;
      return false;
    }
    form_.enter(state_, lane, y_);
    const double scale = 1 / c.radius > ends.r_from ? 1 / c.radius : ends.r_from;
    const double step = scale * 0.5 * __builtin_pow(job_.rtol, 0.2), whole = __builtin_fabs(span);
    const int p = lane / W<T>, q = lane % W<T>;
    r_[p][q] = T(ends.r_from), r_to_[p][q] = T(ends.r_to);
    h_[p][q] = T(__builtin_copysign(step < whole ? step : whole, span));
    active_[p][q] = fresh_[p][q] = -1, rejected_[p][q] = 0;
    steps_[p][q] = evaluations_[p][q] = 0;
    row_[lane] = i;
    --idle_;
    return true;
  }

  // New rows for idle lanes, a few at a time because each refill costs one evaluation of the block.
  void refill() {
    if (drained_ || (idle_ < B<T> && idle_ * 8 < B<T>)) return;
    for (int lane = 0; lane < B<T> && !drained_; ++lane) {
      if (active_[lane / W<T>][lane % W<T>]) continue;
      int64_t begin, end;
      do { drained_ = !next_rows(work_, begin, end); } while (!drained_ && !admit(begin, lane));
    }
    V size[P];
    form_.squared_size(state_, size);
    for (int p = 0; p < P; ++p) size_[p] = fresh_[p] ? square_root(size[p] / T(job_.components->d)) : size_[p];
  }

  void field(const T* z, const V* r, T* slope) { form_.field(z, r, r, slope); }

  void select(const I* mask, const T* from, T* to) const {
    for (int64_t j = 0; j < rows_ * B<T>; j += B<T>)
      for (int p = 0; p < P; ++p) at(to + j + p * W<T>) = mask[p] ? at(from + j + p * W<T>) : at(to + j + p * W<T>);
  }

  void first_slope() {
    field(state_, r_, next_);
    select(fresh_, next_, slopes_[0]);
    for (int p = 0; p < P; ++p) evaluations_[p] -= fresh_[p], fresh_[p] = I{};
  }

  // One step of every active lane: next_, error norm.
  void attempt() {
    const double *nodes = job_.tableau + s_ * s_, *weights = nodes + s_, *errors = weights + s_;
    for (int p = 0; p < P; ++p) {
      const V left = r_to_[p] - r_[p];
      const I last = magnitude(h_[p]) >= magnitude(left);
      step_[p] = active_[p] ? (last ? left : h_[p]) : V{};
      r_next_[p] = active_[p] ? (last ? r_to_[p] : r_[p] + step_[p]) : r_[p];
    }
    for (int64_t j = 1; j < s_; ++j) {
      const bool whole = same_as_last_ && j == s_ - 1;
      T* z = whole ? next_ : stage_;
      combine(state_, T(0), step_, Combination<T>(job_.tableau + j * s_, j, slopes_),
              whole ? rows_ : form_.stage_rows(), z);
      V r[P];
      for (int p = 0; p < P; ++p) r[p] = nodes[j] == 1 ? r_next_[p] : r_[p] + T(nodes[j]) * step_[p];
      field(z, r, slopes_[j]);
    }
    if (!same_as_last_) combine(state_, T(0), step_, Combination<T>(weights, s_, slopes_), rows_, next_);
    combine<T>(nullptr, T(0), step_, Combination<T>(errors, s_, slopes_), rows_, stage_);
    form_.squared_error(stage_, error_);
    form_.squared_size(next_, size_next_);
  }

  // Accepts or rejects, chooses the next step size.
  void decide() {
    const T d = T(job_.components->d);
    I all_accepted{};
    for (int p = 0; p < P; ++p) {
      size_next_[p] = square_root(size_next_[p] / d);
      const V bound = T(job_.atol) + T(job_.rtol) * larger(size_[p], size_next_[p]);
      const V error = error_[p] == 0 ? V{} : square_root(error_[p] / d) / bound;
      const V held = smaller(larger(error, all(T(1e-30))), all(T(1e30)));
      V factor = smaller(larger(T(0.9) * inverse_fifth_root<T>(held), all(T(0.2))), all(T(10)));
      factor = rejected_[p] ? smaller(factor, all(T(1))) : factor;
      broken_[p] = active_[p] & ~((size_next_[p] - size_next_[p] == 0) & (error - error == 0));
      accepted_[p] = active_[p] & ~broken_[p] & (error <= 1);
      rejected_[p] = active_[p] & ~accepted_[p];
      all_accepted |= rejected_[p];
      steps_[p] -= active_[p];
      evaluations_[p] -= active_[p] * (decltype(active_[p][0] + 0)(s_) - 1);
      h_[p] = active_[p] ? step_[p] * factor : h_[p];
      r_[p] = accepted_[p] ? r_next_[p] : r_[p];
      size_[p] = accepted_[p] ? size_next_[p] : size_[p];
      fresh_[p] = same_as_last_ ? I{} : accepted_[p];
    }
    if (!any(all_accepted)) {  // idle lanes made a step of length zero: theirs may be taken too
      T* state = state_;
      state_ = next_, next_ = state;
    } else {
      select(accepted_, next_, state_);
    }
    if (same_as_last_) select(accepted_, slopes_[s_ - 1], slopes_[0]);
  }

  void retire() {
    I finished[P];
    for (int p = 0; p < P; ++p) {
      const V left = magnitude(r_to_[p] - r_[p]), h = magnitude(h_[p]);
      arrived_[p] = accepted_[p] & (r_[p] == r_to_[p]);
      stuck_[p] = (h < 4 * Simd<T>::eps * magnitude(r_[p])) & (h < left);
      finished[p] = active_[p] & (arrived_[p] | stuck_[p] | broken_[p] | (steps_[p] >= job_.max_steps));
    }
    if (!any_lane(finished)) return;
    for (int lane = 0; lane < B<T>; ++lane)
      if (finished[lane / W<T>][lane % W<T>]) finish(lane);
  }

  void finish(int lane) {
    const int p = lane / W<T>, q = lane % W<T>;
    const int64_t i = row_[lane], stride = job_.components->stride;
    const Ends<T> ends(job_, i);
    enter_row(job_, i, ends, y_);
    form_.leave(state_, lane, 1.0, y_);
    for (int64_t j = 0; broken_[p][q] && j < stride; ++j) y_[j] = T(__builtin_nan(""));
    leave_row(job_, i, ends, y_);
    job_.status[i] = int8_t(broken_[p][q] ? 2 : arrived_[p][q] ? 0 : stuck_[p][q] ? 3 : 1);
    job_.attempts[i] = int32_t(steps_[p][q]), job_.evaluations[i] = int32_t(evaluations_[p][q]);
    active_[p][q] = fresh_[p][q] = 0;
    ++idle_;
  }

  const FlowJob<T>& job_;
  Work& work_;
  Form form_;
  const int64_t s_, rows_;
  bool same_as_last_ = false, drained_ = false;
  int idle_ = B<T>;
  T *state_, *next_, *stage_, *y_, *slopes_[kStages];  // (rows, B) each; y_ (stride,)
  int64_t row_[B<T>];
  V r_[P] = {}, r_to_[P] = {}, r_next_[P], h_[P] = {}, step_[P], size_[P] = {}, size_next_[P], error_[P];
  I active_[P] = {}, fresh_[P] = {}, rejected_[P] = {}, accepted_[P], broken_[P], arrived_[P], stuck_[P];
  I steps_[P] = {}, evaluations_[P] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
