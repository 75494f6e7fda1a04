// Explicit Runge-Kutta with a fixed number of steps, from tables of numbers: no schedule and no method reaches this
// file.
#pragma once
#include "flow_forms.hpp"
#include "separation.hpp"

namespace flowfast::FLOWFAST_ISA {

// Rows of x through job.steps steps of job.table. A non-finite row stays alone in its lane.
template <class T, bool kSpan>
void flow_fixed(const FlowJob<T>& job, Work& work, Arena& arena) {
  Form<T, kSpan> form(job, arena);
  const int64_t s = job.stages;
  T* state = take<T>(arena, form.state_rows * B<T>);
  Slope<T> slopes[kStages];
  for (int64_t j = 0; j < s; ++j) slopes[j].rows = take<T>(arena, form.rows * B<T>);
  Vec<T> one[P], gain[P], ratio[P], size2[P];
  for (int p = 0; p < P; ++p) one[p] = all(T(1));
  for (Batch<T> batch; batch.next(work);) {
    form.enter(batch, state, size2);
    double phi = 1;
    const double* row = job.table;
    for (int64_t step = 0; step < job.steps; ++step, row += s + 3) {
      for (int64_t j = 0; j < s; ++j, row += s + 3) {
        for (int p = 0; p < P; ++p) gain[p] = all(T(row[1] * row[2])), ratio[p] = all(T(row[2] / row[1]));
        form.evaluate(state, T(row[0]), Sum<T>(row + 3, j, one, slopes), gain, ratio, slopes[j]);
      }
      form.advance(state, T(row[0]), Sum<T>(row + 3, s, one, slopes), state, size2);
      phi *= 1 + row[0];
    }
    form.leave(batch, state + (form.state_rows - form.rows) * B<T>, phi);
    const int64_t d = job.components->d;
    for (int64_t l = 0; l < batch.count; ++l)
      job.status[batch.row[l]] = is_finite(job.out + batch.row[l] * d, d) ? 0 : 2;
  }
}

}  // namespace flowfast::FLOWFAST_ISA
