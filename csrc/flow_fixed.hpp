// Explicit Runge-Kutta with a fixed number of steps. The tables are numbers: no schedule and no method reaches this
// file.
#pragma once
#include "flow_forms.hpp"

namespace flowfast::FLOWFAST_ISA {

constexpr int kStages = 16;  // most stages a tableau may have

// Linear combination of slopes, zero coefficients left out.
template <class T>
struct Combination {
  const T* slope[kStages];
  T coefficient[kStages];
  int size = 0;
  template <class Slopes>
  Combination(const double* coefficients, int64_t count, const Slopes& slopes) {
    for (int64_t l = 0; l < count; ++l)
      if (coefficients[l] != 0) slope[size] = slopes[l], coefficient[size++] = T(coefficients[l]);
  }
};

// out (rows, B) = base + (rho base + h sum_l coefficient_l slope_l); base may be null (zero) and may be out
template <class T>
void combine(const T* base, T rho, const Vec<T>* h, const Combination<T>& sum, int64_t rows, T* out) {
  for (int64_t j = 0; j < rows * B<T>; j += B<T>)
    for (int p = 0; p < P; ++p) {
      Vec<T> slope{};
      for (int l = 0; l < sum.size; ++l) slope += sum.coefficient[l] * at(sum.slope[l] + j + p * W<T>);
      slope *= h[p];
      if (base) {
        const Vec<T> from = at(base + j + p * W<T>);
        slope = from + (rho * from + slope);
      }
      at(out + j + p * W<T>) = slope;
    }
}

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
  for (int64_t j = 0; j < c.d; ++j)
    y[j] = T((double(job.x[i * c.d + j]) - ends.r_from * ends.s_from * job.center[j]) / ends.s_from);
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
  const int64_t s = job.stages, rows = form.rows();
  T* state = take<T>(arena, rows * B<T>);
  T* stage = take<T>(arena, rows * B<T>);
  T* y = take<T>(arena, job.components->stride);
  T* slopes[kStages];
  for (int64_t j = 0; j < s; ++j) slopes[j] = take<T>(arena, rows * B<T>);
  Vec<T> one[P], gain[P], ratio[P];
  for (int p = 0; p < P; ++p) one[p] = all(T(1));
  int64_t begin, end;
  while (next_rows(work, begin, end)) {
    for (; begin < end; begin += B<T>) {
      const int64_t count = end - begin < B<T> ? end - begin : B<T>;
      for (int lane = 0; lane < B<T>; ++lane) {
        const int64_t i = begin + (lane < count ? lane : count - 1);
        enter_row(job, i, Ends<T>(job, i), y);
        form.enter(state, lane, y);
      }
      double phi = 1;
      for (int64_t step = 0; step < job.steps; ++step) {
        const double* table = job.table + step * (s + 1) * (s + 3);
        for (int64_t j = 0; j <= s; ++j, table += s + 3) {
          const Combination<T> sum(table + 3, j, slopes);
          if (j > 0) combine(state, T(table[0]), one, sum, j < s ? form.stage_rows() : rows, j < s ? stage : state);
          if (j == s) break;
          for (int p = 0; p < P; ++p) gain[p] = all(T(table[1] * table[2])), ratio[p] = all(T(table[2] / table[1]));
          form.field(j > 0 ? stage : state, gain, ratio, slopes[j]);
        }
        phi *= 1 + table[0];
      }
      for (int lane = 0; lane < count; ++lane) {
        const Ends<T> ends(job, begin + lane);
        enter_row(job, begin + lane, ends, y);
        form.leave(state, lane, phi, y);
        leave_row(job, begin + lane, ends, y);
      }
    }
  }
}

}  // namespace flowfast::FLOWFAST_ISA
