// What an instruction set offers: plain structures and one table of function pointers, no code.
// Letters: n points, k components, d dimension, S stages, m steps; B = block, the points worked on together.
#pragma once
#include <cstddef>
#include <cstdint>

namespace flowfast {

class Work;   // rows still to do, shared by the workers of one call (pool.hpp)
class Arena;  // 64-byte aligned scratch memory of one worker (pool.hpp)
bool next_rows(Work& work, int64_t& begin, int64_t& end);
void* take_bytes(Arena& arena, size_t bytes);

// The components that carry weight, centred and padded with zero rows of weight zero (prepare.hpp).
template <class T>
struct Components {
  const T* rows;            // (k_pad, stride) means - center, rounded to T, 64-byte aligned rows
  const T* log_weights;     // (k_pad,) -inf in the padding
  const T* half_norms;      // (k_pad,) |row|^2 / 2
  const int64_t* index;     // (k,) row of the caller's means
  const double* center;     // (stride,) zero in the padding
  const T* means;           // (k_all, d) as the caller gave them
  double radius;            // max |row|
  int64_t k, k_pad, k_all;  // components with weight, the same padded to kPadRows, all components
  int64_t d, stride;        // dimension, the same padded to kPadColumns
};
constexpr int64_t kPadRows = 8, kPadColumns = 16;

// Row i sees centres alpha_i * means and standard deviation std_i. Null outputs are not computed.
template <class T>
struct PosteriorJob {
  const Components<T>* components;
  const T* x;                    // (n, d)
  const T* v;                    // (n, d), needed by hvp only
  const double *alpha, *std;     // (n,) or (1,)
  int64_t alpha_step, std_step;  // 1 or 0
  T* log_density;                // (n,)
  T* score;                      // (n, d)
  T* posterior_mean;             // (n, d)
  T* trace;                      // (n,)
  T* weights;                    // (n, k_all)
  T* hvp;                        // (n, d)
};

// One trajectory per row. gram == nullptr selects the full form, otherwise the span of the means carries the state.
template <class T>
struct FlowJob {
  const Components<T>* components;  // center is zero: the caller's means are centred already
  const T* gram;                    // (k_pad, gram_stride) rows . rows
  int64_t gram_stride;
  const T* x;                       // (n, d)
  T* out;                           // (n, d)
  const double* center;             // (d,)
  const double* ends[4];            // r_from, s_from, r_to, s_to: (n,) or (1,)
  int64_t ends_step;                // 1 or 0
  int64_t stages;                   // S
  int64_t steps;                    // fixed: m
  const double* table;              // fixed: (m, S + 1, S + 3), see step_table in prepare.hpp
  const double* tableau;            // adaptive: (S + 3, S): A, nodes, b, b - bhat
  double rtol, atol;                // adaptive
  int32_t max_steps;                // adaptive
  int8_t* status;                   // (n,) adaptive: 0 success, 1 max_steps, 2 non-finite, 3 step underflow
  int32_t *attempts, *evaluations;  // (n,) adaptive
};

template <class T>
struct Kernels {
  int64_t block;  // B
  void (*posterior)(const PosteriorJob<T>&, Work&, Arena&);
  void (*gram)(const Components<T>&, T* gram, int64_t gram_stride, Work&, Arena&);
  void (*flow_fixed)(const FlowJob<T>&, Work&, Arena&);
  void (*flow_adaptive)(const FlowJob<T>&, Work&, Arena&);
  double (*diameter)(const Components<T>&, Work&, Arena&);  // of the rows in this worker's share of the triangle
  void (*exponential)(const T* x, T* out, int64_t n);
};

struct Isa {
  const char* name;
  const Kernels<float>* float32;
  const Kernels<double>* float64;
};

}  // namespace flowfast
