// Explicit Runge-Kutta with a fixed number of steps. The tables are numbers: no schedule and no method reaches this
// file.
#pragma once
#include "flow_forms.hpp"

namespace flowfast::FLOWFAST_ISA {

// Rows of x through job.steps steps of job.table. A non-finite row stays alone in its lane.
template <class T, class Form>
void flow_fixed(const FlowJob<T>& job, Work& work, Arena& arena) {
  Form form(job, arena);
  const int64_t s = job.stages;
  T* state = take<T>(arena, form.state_rows() * B<T>);
  Slope<T> slopes[kStages];
  for (int64_t j = 0; j < s; ++j) slopes[j].rows = take<T>(arena, form.rows() * B<T>);
  Vec<T> one[P], gain[P], ratio[P], size2[P];
  for (int p = 0; p < P; ++p) one[p] = all(T(1));
  Batch batch;
  int64_t begin, end;
  while (next_rows(work, begin, end))
    for (; begin < end; begin += B<T>) {
      batch.take<T>(begin, end);
      form.enter(batch, state, size2);
      double phi = 1;
      for (int64_t step = 0; step < job.steps; ++step) {
        const double* table = job.table + step * (s + 1) * (s + 3);
        for (int64_t j = 0; j < s; ++j, table += s + 3) {
          for (int p = 0; p < P; ++p) gain[p] = all(T(table[1] * table[2])), ratio[p] = all(T(table[2] / table[1]));
          form.evaluate(state, T(table[0]), Sum<T>(table + 3, j, one, slopes), gain, ratio, slopes[j]);
        }
        form.advance(state, T(table[0]), Sum<T>(table + 3, s, one, slopes), state, nullptr);
        phi *= 1 + table[0];
      }
      form.leave(batch, state + (form.state_rows() - form.rows()) * B<T>, phi);
    }
}

}  // namespace flowfast::FLOWFAST_ISA
