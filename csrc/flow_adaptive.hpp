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
    y_ = take<T>(arena, kTile * job.components->stride);
    for (int64_t j = 0; j < s_; ++j) slopes_[j] = take<T>(arena, rows_ * B<T>);
    for (int64_t& row : row_) row = -1;
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

  // Puts row i into a lane, its start into y; false if there is nothing to integrate (the output row is written).
  bool admit(int64_t i, int lane, T* y) {
    const Components<T>& c = *job_.components;
    const Ends<T> ends(job_, i);
    enter_row(job_, i, ends, y);
    const double span = ends.r_to - ends.r_from;
    bool finite = span - span == 0 && ends.s_to - ends.s_to == 0;
    V zero{};  // NaN where some coordinate is not finite
    for (int64_t j = 0; j < c.stride; j += W<T>) zero += at(y + j) - at(y + j);
    finite &= sum_lanes(zero) == 0;
    if (!finite || span == 0) {
      for (int64_t j = 0; !finite && j < c.d; ++j) y[j] = T(__builtin_nan(""));
      leave_row(job_, i, ends, y);
      job_.status[i] = finite ? 0 : 2, job_.attempts[i] = job_.evaluations[i] = 0;
      return false;
    }
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

  // Writes finished rows and takes new ones, several lanes at a time: the work per row is shared, and each refill costs
  // one evaluation of the block.
  void refill() {
    if (drained_ ? idle_ < B<T> : idle_ * 4 < B<T>) return;
    finish();
    if (drained_) return;
    int lanes[kTile], count = 0;
    for (int lane = 0; lane < B<T> && !drained_; ++lane) {
      if (active_[lane / W<T>][lane % W<T>]) continue;
      int64_t begin, end;
      T* y = y_ + count * job_.components->stride;
      do { drained_ = !next_rows(work_, begin, end); } while (!drained_ && !admit(begin, lane, y));
      if (!drained_) lanes[count++] = lane;
      if (count == kTile) form_.enter(state_, lanes, count, y_), count = 0;
    }
    if (count > 0) form_.enter(state_, lanes, count, y_);
    V size[P];
    form_.squared_size(state_, size);
    for (int p = 0; p < P; ++p) size_[p] = fresh_[p] ? square_root(size[p] / T(job_.components->d)) : size_[p];
  }

  void select(const I* mask, const T* from, T* to) const {
    for (int64_t j = 0; j < rows_ * B<T>; j += B<T>)
      for (int p = 0; p < P; ++p) at(to + j + p * W<T>) = mask[p] ? at(from + j + p * W<T>) : at(to + j + p * W<T>);
  }

  void first_slope() {
    const V still[P] = {};
    form_.field(Stage<T>(state_, T(0), still, nullptr, 0, slopes_), r_, r_, next_);
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
      Stage<T> stage(state_, T(0), step_, job_.tableau + j * s_, j, slopes_);
      if (same_as_last_ && j == s_ - 1) stage.store(rows_, next_), stage.base = next_, stage.size = 0;
      V r[P];
      for (int p = 0; p < P; ++p) r[p] = nodes[j] == 1 ? r_next_[p] : r_[p] + T(nodes[j]) * step_[p];
      form_.field(stage, r, r, slopes_[j]);
    }
    if (!same_as_last_) Stage<T>(state_, T(0), step_, weights, s_, slopes_).store(rows_, next_);
    form_.squared_error(Stage<T>(nullptr, T(0), step_, errors, s_, slopes_), error_);
    form_.squared_size(next_, size_next_);
  }

  // Accepts or rejects, chooses the next step size.
  void decide() {
    const T d = T(job_.components->d);
    I some_rejected{};
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
      some_rejected |= rejected_[p];
      steps_[p] -= active_[p];
      evaluations_[p] -= active_[p] * (decltype(active_[p][0] + 0)(s_) - 1);
      h_[p] = active_[p] ? step_[p] * factor : h_[p];
      r_[p] = accepted_[p] ? r_next_[p] : r_[p];
      size_[p] = accepted_[p] ? size_next_[p] : size_[p];
      fresh_[p] = same_as_last_ ? I{} : accepted_[p];
    }
    if (!any(some_rejected)) {  // idle lanes made a step of length zero: theirs may be taken too
      std::swap(state_, next_);
      if (same_as_last_) std::swap(slopes_[0], slopes_[s_ - 1]);
    } else {
      select(accepted_, next_, state_);
      if (same_as_last_) select(accepted_, slopes_[s_ - 1], slopes_[0]);
    }
  }

  // Finished lanes stand still until refill() writes them.
  void retire() {
    for (int p = 0; p < P; ++p) {
      const V left = magnitude(r_to_[p] - r_[p]), h = magnitude(h_[p]);
      const I arrived = accepted_[p] & (r_[p] == r_to_[p]);
      const I stuck = (h < 4 * Simd<T>::eps * magnitude(r_[p])) & (h < left);
      const I finished = active_[p] & (arrived | stuck | broken_[p] | (steps_[p] >= job_.max_steps));
      const I reason = (broken_[p] & 2) | (~broken_[p] & ~arrived & ((stuck & 3) | (~stuck & 1)));
      status_[p] = finished ? reason : status_[p];
      active_[p] &= ~finished, fresh_[p] &= ~finished;
      idle_ -= int(sum_lanes(finished));
    }
  }

  void finish() {
    int lanes[kTile], count = 0;
    for (int lane = 0; lane < B<T>; ++lane) {
      if (row_[lane] >= 0 && !active_[lane / W<T>][lane % W<T>]) lanes[count++] = lane;
      if (count == kTile || (count > 0 && lane == B<T> - 1)) write(lanes, count), count = 0;
    }
  }

  void write(const int* lanes, int count) {
    const int64_t stride = job_.components->stride;
    for (int l = 0; l < count; ++l) enter_row(job_, row_[lanes[l]], Ends<T>(job_, row_[lanes[l]]), y_ + l * stride);
    form_.leave(state_, lanes, count, 1.0, y_);
    for (int l = 0; l < count; ++l) {
      const int p = lanes[l] / W<T>, q = lanes[l] % W<T>;
      const int64_t i = row_[lanes[l]];
      T* y = y_ + l * stride;
      for (int64_t j = 0; status_[p][q] == 2 && j < stride; ++j) y[j] = T(__builtin_nan(""));
      leave_row(job_, i, Ends<T>(job_, i), y);
      job_.status[i] = int8_t(status_[p][q]);
      job_.attempts[i] = int32_t(steps_[p][q]), job_.evaluations[i] = int32_t(evaluations_[p][q]);
      row_[lanes[l]] = -1;
    }
  }

  const FlowJob<T>& job_;
  Work& work_;
  Form form_;
  const int64_t s_, rows_;
  bool same_as_last_ = false, drained_ = false;
  int idle_ = B<T>;
  T *state_, *next_, *y_, *slopes_[kStages];  // (rows, B) each; y_ (kTile, stride)
  int64_t row_[B<T>];                         // -1: the lane holds nothing
  V r_[P] = {}, r_to_[P] = {}, r_next_[P], h_[P] = {}, step_[P], size_[P] = {}, size_next_[P], error_[P];
  I active_[P] = {}, fresh_[P] = {}, rejected_[P] = {}, accepted_[P], broken_[P], status_[P];
  I steps_[P] = {}, evaluations_[P] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
