// Embedded Runge-Kutta with one step size per trajectory. A lane whose trajectory has ended takes the next one from a
// waiting room; no operation mixes lanes, so a trajectory's bits do not depend on its neighbours.
#pragma once
#include "flow_fixed.hpp"
#include "separation.hpp"

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

template <class T, bool kSpan>
class Adaptive {
  using V = Vec<T>;
  using I = Int<T>;
  static constexpr int kSuccess = 0, kMaxSteps = 1, kNonFinite = 2, kUnderflow = 3;  // as in FlowJob::status

 public:
  Adaptive(const FlowJob<T>& job, Work& work, Arena& arena)
      : job_(job), work_(work), form_(job, arena), s_(job.stages), nodes_(job.tableau + s_ * s_) {
    for (T** state : {&state_, &next_, &waiting_, &leaving_, &zero_, &error_}) *state = zeros(arena, form_.state_rows);
    for (int64_t j = 0; j <= s_; ++j) (j < s_ ? slopes_[j] : first_).rows = zeros(arena, form_.rows);
    const double *weights = nodes_ + s_, *last = nodes_ - s_;
    reuse_ = nodes_[s_ - 1] == 1 && weights[s_ - 1] == 0;
    for (int64_t j = 0; j < s_; ++j) reuse_ &= last[j] == weights[j];
  }

  void run() {
    for (int lane = 0; lane < B<T>; ++lane) active_lanes_ += admit(lane);
    while (active_lanes_ > 0) attempt(), decide();
    form_.leave(out_, leaving_, 1.0);
  }

 private:
  static T* zeros(Arena& arena, int64_t rows) {  // lanes without a trajectory compute too
    T* to = take<T>(arena, rows * B<T>);
    for (int64_t i = 0; i < rows * B<T>; ++i) to[i] = 0;
    return to;
  }

  // Gives a lane the next trajectory; false when none is left.
  bool admit(int lane) {
    const int p = lane / W<T>, q = lane % W<T>;
    const int64_t d = job_.components->d;
    while (true) {
      if (slot_ == in_.count) {
        if (!in_.next(work_)) return false;
        form_.enter(in_, waiting_, first_size2_);
        V r[P];
        for (int l = 0; l < B<T>; ++l) r[l / W<T>][l % W<T>] = T(job_.ends[0][in_.row[l] * job_.ends_step]);
        form_.evaluate(waiting_, T(0), Sum<T>(), r, r, first_);
        slot_ = 0;
      }
      const int slot = int(slot_++), u = slot / W<T>, v = slot % W<T>;
      const int64_t row = in_.row[slot], end = row * job_.ends_step;
      const double from = job_.ends[0][end], to = job_.ends[2][end], s_to = job_.ends[3][end];
      const double span = to - from, whole = __builtin_fabs(span), radius = job_.components->radius;
      const T size2 = first_size2_[u][v];
      const bool sound = size2 - size2 == 0 || is_finite(job_.x + row * d, d),
                 finite = sound && s_to - s_to + span - span == 0;
      if (!finite || span == 0) {
        settle(waiting_, slot, row, finite ? kSuccess : kNonFinite, 0);
        continue;
      }
      const double step = (1 / radius > from ? 1 / radius : from) * 0.5 * __builtin_pow(job_.rtol, 0.2);
      for (int64_t j = 0; j < form_.state_rows; ++j) state_[j * B<T> + lane] = waiting_[j * B<T> + slot];
      for (int64_t j = 0; j < form_.rows; ++j) slopes_[0].rows[j * B<T> + lane] = first_.rows[j * B<T> + slot];
      slopes_[0].scale[p][q] = first_.scale[u][v], size2_[p][q] = size2, row_[lane] = row;
      r_[p][q] = T(from), r_to_[p][q] = T(to), h_[p][q] = T(__builtin_copysign(step < whole ? step : whole, span));
      active_[p][q] = -1, rejected_[p][q] = 0, steps_[p][q] = 0;
      return true;
    }
  }

  // One column of a state has ended; the rows leave together.
  void settle(const T* state, int lane, int64_t row, int status, int32_t attempts) {
    const T* from = state + (form_.state_rows - form_.rows) * B<T> + lane;
    for (int64_t j = 0; j < form_.rows; ++j)
      leaving_[j * B<T> + out_.count] = status == kNonFinite ? T(__builtin_nan("")) : from[j * B<T>];
    out_.row[out_.count++] = row;
    job_.status[row] = int8_t(status), job_.attempts[row] = attempts;
    job_.evaluations[row] = attempts ? int32_t(reuse_ + attempts * (s_ - reuse_)) : 0;
    if (out_.count == B<T>) form_.leave(out_, leaving_, 1.0), out_.count = 0;
  }

  // One step of every active lane: next_, error2_.
  void attempt() {
    const double *weights = nodes_ + s_, *errors = weights + s_;
    for (int p = 0; p < P; ++p) {
      const V left = r_to_[p] - r_[p];
      const I last = magnitude(h_[p]) >= magnitude(left);
      step_[p] = active_[p] ? (last ? left : h_[p]) : V{};
      r_next_[p] = active_[p] ? (last ? r_to_[p] : r_[p] + step_[p]) : r_[p];
      size2_next_[p] = size2_[p], error2_[p] = V{};
    }
    for (int64_t j = reuse_; j < s_ - reuse_; ++j) {
      V r[P];
      for (int p = 0; p < P; ++p) r[p] = nodes_[j] == 1 ? r_next_[p] : r_[p] + T(nodes_[j]) * step_[p];
      form_.evaluate(state_, T(0), Sum<T>(job_.tableau + j * s_, j, step_, slopes_), r, r, slopes_[j]);
    }
    form_.advance(state_, T(0), Sum<T>(weights, s_ - reuse_, step_, slopes_), next_, size2_next_);
    if (reuse_) form_.evaluate(next_, T(0), Sum<T>(), r_next_, r_next_, slopes_[s_ - 1]);
    form_.advance(zero_, T(0), Sum<T>(errors, s_, step_, slopes_), error_, error2_);
  }

  // Accepts or rejects, chooses the next step size, settles what has arrived or failed.
  void decide() {
    I accepted[P], finished[P], reason[P];
    const T d = T(job_.components->d);
    for (int p = 0; p < P; ++p) {
      const V bound = T(job_.atol) + T(job_.rtol) * square_root(larger(size2_[p], size2_next_[p]) / d);
      const V error = error2_[p] == 0 ? V{} : square_root(error2_[p] / d) / bound;
      const V held = smaller(larger(error, all(T(1e-30))), all(T(1e30)));
      const V factor = smaller(larger(T(0.9) * inverse_fifth_root<T>(held), all(T(0.2))), all(T(10)));
      const I broken = active_[p] & ~((size2_next_[p] - size2_next_[p] == 0) & (error - error == 0));
      accepted[p] = active_[p] & ~broken & (error <= 1);
      h_[p] = active_[p] ? step_[p] * (rejected_[p] ? smaller(factor, all(T(1))) : factor) : h_[p];
      rejected_[p] = active_[p] & ~accepted[p];
      steps_[p] -= active_[p];
      r_[p] = accepted[p] ? r_next_[p] : r_[p];
      size2_[p] = accepted[p] ? size2_next_[p] : size2_[p];
      slopes_[0].scale[p] = accepted[p] ? slopes_[s_ - 1].scale[p] : slopes_[0].scale[p];
      const V left = magnitude(r_to_[p] - r_[p]), h = magnitude(h_[p]);
      const I arrived = accepted[p] & (left == 0), stuck = (h < 4 * Simd<T>::eps * magnitude(r_[p])) & (h < left);
      finished[p] = active_[p] & (arrived | stuck | broken | (steps_[p] >= job_.max_steps));
      reason[p] = (broken & kNonFinite) | (~broken & ~arrived & ((stuck & kUnderflow) | (~stuck & kMaxSteps)));
    }
    select(accepted, form_.state_rows, next_, state_);
    select(accepted, form_.rows, slopes_[s_ - 1].rows, slopes_[0].rows);
    for (int lane = 0; lane < B<T>; ++lane) {
      const int p = lane / W<T>, q = lane % W<T>;
      if (!finished[p][q]) continue;
      settle(state_, lane, row_[lane], int(reason[p][q]), int32_t(steps_[p][q]));
      active_[p][q] = 0, active_lanes_ -= !admit(lane);
    }
  }
  static void select(const I* mask, int64_t rows, const T* from, T* to) {
    for (int64_t j = 0; j < rows * B<T>; j += B<T>)
      for (int p = 0; p < P; ++p) at(to + j + p * W<T>) = mask[p] ? at(from + j + p * W<T>) : at(to + j + p * W<T>);
  }

  const FlowJob<T>& job_;
  Work& work_;
  Form<T, kSpan> form_;
  const int64_t s_;
  const double* nodes_;
  bool reuse_;         // the last stage is the next step's first
  Batch<T> in_, out_;  // the waiting room, whose rows before slot_ have left; rows that have ended
  int64_t slot_ = 0, active_lanes_ = 0, row_[B<T>];
  T *state_, *next_, *waiting_, *leaving_, *zero_, *error_;  // (state_rows, B)
  Slope<T> slopes_[kStages], first_;
  V first_size2_[P], r_[P] = {}, r_to_[P] = {}, r_next_[P], h_[P] = {}, step_[P];
  V size2_[P] = {}, size2_next_[P], error2_[P];  // squared norms
  I active_[P] = {}, rejected_[P] = {}, steps_[P] = {};
};

}  // namespace flowfast::FLOWFAST_ISA
