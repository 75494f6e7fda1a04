// Explicit Runge-Kutta with a fixed number of steps. The tables are numbers: no schedule and no method reaches this
// file.
#pragma once
#include "flow_forms.hpp"

namespace flowfast::FLOWFAST_ISA {

template <class T>
struct Ends {
  double r_from, s_from, r_to, s_to;
  Ends(const FlowJob<T>& job, int64_t i)
      : r_from(job.ends[0][i * job.ends_step]),
        s_from(job.ends[1][i * job.ends_step]),
        r_to(job.ends[2][i * job.ends_step]),
        s_to(job.ends[3][i * job.ends_step]) {}
};

// y (stride,) = (x - r_from s_from center) / s_from, zero padded
template <class T>
void enter_row(const FlowJob<T>& job, int64_t i, const Ends<T>& ends, T* y) {
  const Components<T>& c = *job.components;
  const double inverse = 1 / ends.s_from;
  for (int64_t j = 0; j < c.d; ++j) y[j] = T(double(job.x[i * c.d + j]) * inverse - ends.r_from * job.center[j]);
  for (int64_t j = c.d; j < c.stride; ++j) y[j] = 0;
}

// row i of out = s_to y + r_to s_to center
template <class T>
void leave_row(const FlowJob<T>& job, int64_t i, const Ends<T>& ends, const T* y) {
  const int64_t d = job.components->d;
  for (int64_t j = 0; j < d; ++j)
    job.out[i * d + j] = T(ends.s_to * double(y[j]) + ends.r_to * ends.s_to * job.center[j]);
}

// Rows of x through job.steps steps of job.table. A non-finite row stays alone in its lane.
template <class T, class Form>
void flow_fixed(const FlowJob<T>& job, Work& work, Arena& arena) {
  Form form(job, arena);
  const int64_t s = job.stages, rows = form.rows(), stride = job.components->stride;
  T* state = take<T>(arena, rows * B<T>);
  T* y = take<T>(arena, kTile * stride);
  T* slopes[kStages];
  for (int64_t j = 0; j < s; ++j) slopes[j] = take<T>(arena, rows * B<T>);
  Vec<T> one[P], gain[P], ratio[P];
  for (int p = 0; p < P; ++p) one[p] = all(T(1));
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      int lanes[B<T>];
      const int count = int(end - begin < B<T> ? end - begin : B<T>);
      for (int lane = 0; lane < B<T>; lane += kTile) {
        for (int l = 0; l < kTile; ++l) {
          const int64_t i = begin + (lane + l < count ? lane + l : count - 1);
          lanes[lane + l] = lane + l;
          enter_row(job, i, Ends<T>(job, i), y + l * stride);
        }
        form.enter(state, lanes + lane, kTile, y);
      }
      double phi = 1;
      for (int64_t step = 0; step < job.steps; ++step) {
        const double* table = job.table + step * (s + 1) * (s + 3);
        for (int64_t j = 0; j < s; ++j, table += s + 3) {
          for (int p = 0; p < P; ++p) gain[p] = all(T(table[1] * table[2])), ratio[p] = all(T(table[2] / table[1]));
          form.field(Stage<T>(state, T(table[0]), one, table + 3, j, slopes), gain, ratio, slopes[j]);
        }
        Stage<T>(state, T(table[0]), one, table + 3, s, slopes).store(rows, state);
        phi *= 1 + table[0];
      }
      for (int lane = 0; lane < count; lane += kTile) {
        const int group = count - lane < kTile ? count - lane : kTile;
        for (int l = 0; l < group; ++l)
          enter_row(job, begin + lane + l, Ends<T>(job, begin + lane + l), y + l * stride);
        form.leave(state, lanes + lane, group, phi, y);
        for (int l = 0; l < group; ++l)
          leave_row(job, begin + lane + l, Ends<T>(job, begin + lane + l), y + l * stride);
      }
    }
  }
}

}  // namespace flowfast::FLOWFAST_ISA
