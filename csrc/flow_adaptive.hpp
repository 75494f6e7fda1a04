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
  using V = Vec<T>;
  using I = Int<T>;
  static constexpr int success = 0, max_steps = 1, not_finite = 2, underflow = 3;  // as in FlowJob::status

 public:
  Adaptive(const FlowJob<T>& job, Work& work, Arena& arena)
      : job_(job),
        work_(work),
        form_(job, arena),
        s_(job.stages),
        rows_(form_.rows()),
        state_rows_(form_.state_rows()) {
    for (T** state : {&state_, &next_, &waiting_}) *state = take<T>(arena, state_rows_ * B<T>);
    leaving_ = take<T>(arena, rows_ * B<T>), waiting_slope_.rows = take<T>(arena, rows_ * B<T>);
    for (int64_t j = 0; j < s_; ++j) slopes_[j] = {take<T>(arena, rows_ * B<T>), {}};
    for (int64_t i = 0; i < state_rows_ * B<T>; ++i) state_[i] = 0;  // lanes that never hold a trajectory compute too
    for (int64_t i = 0; i < rows_ * B<T>; ++i) slopes_[0].rows[i] = 0;
    const double *nodes = job.tableau + s_ * s_, *weights = nodes + s_, *last = nodes - s_;
    same_as_last_ = nodes[s_ - 1] == 1 && weights[s_ - 1] == 0;
    for (int64_t j = 0; j < s_; ++j) same_as_last_ &= last[j] == weights[j];
  }

  void run() {
    for (int lane = 0; lane < B<T>; ++lane) active_count_ += admit(lane);
    while (active_count_ > 0) attempt(), decide();
    if (out_.count > 0) form_.leave(out_, leaving_, 1.0);
  }

 private:
  static V fifth(V e) { return inverse_fifth_root<T>(e); }

  // The next trajectory of the waiting room into a lane; false when no row is left.
  bool admit(int lane) {
    const int p = lane / W<T>, q = lane % W<T>;
    while (true) {
      if (slot_ == in_.count) {
        int64_t begin, end;
        if (!next_rows(work_, begin, end)) return false;
        in_.take<T>(begin, end), slot_ = 0;
        form_.enter(in_, waiting_, waiting_size2_);
        V r[P];
        for (int l = 0; l < B<T>; ++l) r[l / W<T>][l % W<T>] = T(job_.ends[0][in_.row[l] * job_.ends_step]);
        if (same_as_last_) form_.evaluate(waiting_, T(0), Sum<T>(), r, r, waiting_slope_);
      }
      const int slot = int(slot_++), u = slot / W<T>, v = slot % W<T>;
      const int64_t row = in_.row[slot], i = row * job_.ends_step;
      const double from = job_.ends[0][i], span = job_.ends[2][i] - from, whole = __builtin_fabs(span);
      const T size2 = waiting_size2_[u][v];
      const bool finite = size2 - size2 == 0 && span - span == 0 && job_.ends[3][i] - job_.ends[3][i] == 0;
      if (!finite || span == 0) {
        settle(waiting_, slot, row, finite ? success : not_finite, 0);
        continue;
      }
      const double radius = job_.components->radius, scale = 1 / radius > from ? 1 / radius : from;
      const double step = scale * 0.5 * __builtin_pow(job_.rtol, 0.2);
      for (int64_t j = 0; j < state_rows_; ++j) state_[j * B<T> + lane] = waiting_[j * B<T> + slot];
      for (int64_t j = 0; j < rows_; ++j) slopes_[0].rows[j * B<T> + lane] = waiting_slope_.rows[j * B<T> + slot];
      slopes_[0].scale[p][q] = waiting_slope_.scale[u][v];
      size2_[p][q] = size2;
      r_[p][q] = T(from), r_to_[p][q] = T(job_.ends[2][i]);
      h_[p][q] = T(__builtin_copysign(step < whole ? step : whole, span));
      active_[p][q] = -1, rejected_[p][q] = 0, steps_[p][q] = 0;
      row_[lane] = row;
      return true;
    }
  }

  // One column of a state is done; B of them are written together.
  void settle(const T* state, int lane, int64_t row, int status, int32_t attempts) {
    const T* from = state + (state_rows_ - rows_) * B<T> + lane;
    T* to = leaving_ + out_.count;
    for (int64_t j = 0; j < rows_; ++j) to[j * B<T>] = status == not_finite ? T(__builtin_nan("")) : from[j * B<T>];
    out_.row[out_.count++] = row;
    job_.status[row] = int8_t(status), job_.attempts[row] = attempts;
    job_.evaluations[row] = attempts ? int32_t(same_as_last_ + attempts * (s_ - same_as_last_)) : 0;
    if (out_.count == B<T>) form_.leave(out_, leaving_, 1.0), out_.count = 0;
  }

  void select(const I* mask, const Slope<T>& from, Slope<T>& to) const {
    select(mask, rows_, from.rows, to.rows);
    for (int p = 0; p < P; ++p) to.scale[p] = mask[p] ? from.scale[p] : to.scale[p];
  }
  static void select(const I* mask, int64_t rows, const T* from, T* to) {
    for (int64_t j = 0; j < rows * B<T>; j += B<T>)
      for (int p = 0; p < P; ++p) at(to + j + p * W<T>) = mask[p] ? at(from + j + p * W<T>) : at(to + j + p * W<T>);
  }

  // One step of every active lane: next_, error2_.
  void attempt() {
    const double *nodes = job_.tableau + s_ * s_, *weights = nodes + s_, *errors = weights + s_;
    for (int p = 0; p < P; ++p) {
      const V left = r_to_[p] - r_[p];
      const I last = magnitude(h_[p]) >= magnitude(left);
      step_[p] = active_[p] ? (last ? left : h_[p]) : V{};
      r_next_[p] = active_[p] ? (last ? r_to_[p] : r_[p] + step_[p]) : r_[p];
      size2_next_[p] = size2_[p];
    }
    for (int64_t j = same_as_last_; j < s_; ++j) {
      V r[P];
      for (int p = 0; p < P; ++p) r[p] = nodes[j] == 1 ? r_next_[p] : r_[p] + T(nodes[j]) * step_[p];
      if (same_as_last_ && j == s_ - 1) {
        form_.advance(state_, T(0), Sum<T>(weights, s_, step_, slopes_), next_, size2_next_);
        form_.evaluate(next_, T(0), Sum<T>(), r, r, slopes_[j]);
      } else {
        form_.evaluate(state_, T(0), Sum<T>(job_.tableau + j * s_, j, step_, slopes_), r, r, slopes_[j]);
      }
    }
    if (!same_as_last_) form_.advance(state_, T(0), Sum<T>(weights, s_, step_, slopes_), next_, size2_next_);
    form_.measure(Sum<T>(errors, s_, step_, slopes_), error2_);
  }

  // Accepts or rejects, chooses the next step size, settles what has arrived or failed and admits others.
  void decide() {
    const T d = T(job_.components->d);
    I accepted[P], finished[P], reason[P], some_rejected{}, some_finished{};
    for (int p = 0; p < P; ++p) {
      const V size = square_root(larger(size2_[p], size2_next_[p]) / d);
      const V bound = T(job_.atol) + T(job_.rtol) * size;
      const V error = error2_[p] == 0 ? V{} : square_root(error2_[p] / d) / bound;
      const V held = smaller(larger(error, all(T(1e-30))), all(T(1e30)));
      V factor = smaller(larger(T(0.9) * fifth(held), all(T(0.2))), all(T(10)));
      factor = rejected_[p] ? smaller(factor, all(T(1))) : factor;
      const I broken = active_[p] & ~((size2_next_[p] - size2_next_[p] == 0) & (error - error == 0));
      accepted[p] = active_[p] & ~broken & (error <= 1);
      rejected_[p] = active_[p] & ~accepted[p];
      some_rejected |= rejected_[p];
      steps_[p] -= active_[p];
      h_[p] = active_[p] ? step_[p] * factor : h_[p];
      r_[p] = accepted[p] ? r_next_[p] : r_[p];
      size2_[p] = accepted[p] ? size2_next_[p] : size2_[p];
      const V left = magnitude(r_to_[p] - r_[p]), h = magnitude(h_[p]);
      const I arrived = accepted[p] & (r_[p] == r_to_[p]);
      const I stuck = (h < 4 * Simd<T>::eps * magnitude(r_[p])) & (h < left);
      finished[p] = active_[p] & (arrived | stuck | broken | (steps_[p] >= job_.max_steps));
      reason[p] = (broken & not_finite) | (~broken & ~arrived & ((stuck & underflow) | (~stuck & max_steps)));
      some_finished |= finished[p];
    }
    if (!any(some_rejected)) {  // idle lanes made a step of length zero: theirs may be taken too
      std::swap(state_, next_);
      if (same_as_last_) std::swap(slopes_[0], slopes_[s_ - 1]);
    } else {
      select(accepted, state_rows_, next_, state_);
      if (same_as_last_) select(accepted, slopes_[s_ - 1], slopes_[0]);
    }
    if (!any(some_finished)) return;
    for (int lane = 0; lane < B<T>; ++lane) {
      const int p = lane / W<T>, q = lane % W<T>;
      if (!finished[p][q]) continue;
      settle(state_, lane, row_[lane], int(reason[p][q]), int32_t(steps_[p][q]));
      active_[p][q] = 0;
      active_count_ -= !admit(lane);
    }
  }

  const FlowJob<T>& job_;
  Work& work_;
  Form form_;
  const int64_t s_, rows_, state_rows_;
  bool same_as_last_ = false;
  int active_count_ = 0;
  Batch in_, out_;  // the waiting room, of which slot_ rows are taken; what leaves
  int64_t slot_ = 0, row_[B<T>];
  T *state_, *next_, *waiting_, *leaving_;
  Slope<T> slopes_[kStages], waiting_slope_;
  V waiting_size2_[P], r_[P] = {}, r_to_[P] = {}, r_next_[P], h_[P] = {}, step_[P];
  V size2_[P] = {}, size2_next_[P], error2_[P];  // squared norms
  I active_[P] = {}, rejected_[P] = {}, steps_[P] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
