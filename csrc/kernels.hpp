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

// A mixture as the kernels read it. Panels (panels.hpp) are packed once, or by each worker when it needs them.
template <class T>
struct Components {
  const T* means;        // (k, d) as the caller gave them
  const T* log_weights;  // (k,) -inf: no weight
  const T* center;       // (stride,) taken from means and points; zero in the padding
  const T* packed;       // every panel, one after the other; null: not packed
  double radius;         // max |mean - center| of the packed panels
  int64_t k, d, stride;  // stride: d padded to kColumns
  int64_t group;         // blocks of points that should share one reading of the panels
};
constexpr int64_t kColumns = 16;
constexpr int64_t kChunk = 64;  // a dot product is a sum of partial sums of this length (error_constant relies on it)
constexpr int64_t kRows = 4;    // components that lie together; they are padded to a multiple, without weight

enum class Output { log_density, score, posterior_mean, trace, weights, hvp };

// One quantity of every row. Row i sees centres alpha_i * means and standard deviation std_i.
template <class T>
struct PosteriorJob {
  const Components<T>* components;
  Output output;
  const T* x;                    // (n, d)
  const T* v;                    // (n, d), needed by hvp only
  const double *alpha, *std;     // (n,) or (1,)
  int64_t alpha_step, std_step;  // 1 or 0
  T* out;                        // (n,) log_density, trace; (n, d) score, posterior_mean, hvp; (n, k) weights
  bool past_caches;              // (n, d): whether rows leave past the caches; they are whole cache lines then
};

// One trajectory per row. gram == nullptr selects the full form, otherwise the span of the means carries the state.
template <class T>
struct FlowJob {
  const Components<T>* components;  // center is zero: the caller's means are centred already
  const T* gram;                    // (k_pad, k_pad) means . means
  int64_t k_pad;
  const T* columns;                 // with gram: the means in chunks of columns, see rows.hpp
  const T* x;                       // (n, d)
  T* out;                           // (n, d)
  const double* center;             // (d,)
  const double* ends[4];            // r_from, s_from, r_to, s_to: (n,) or (1,)
  int64_t ends_step;                // 1 or 0
  int64_t stages;                   // S
  int64_t steps;                    // fixed: m
  const double* table;              // fixed: (m, S + 1, S + 3), see step_table in engine.cpp
  const double* tableau;            // adaptive: (S + 3, S): A, nodes, b, b - bhat
  double rtol, atol;                // adaptive
  int32_t max_steps;                // adaptive
  int8_t* status;                   // (n,) 0 success, 1 max_steps, 2 non-finite, 3 step underflow
  int32_t *attempts, *evaluations;  // (n,) adaptive
};

// Row i is alpha_i mean_c + std_i z: component c and normals z are functions of the seed and of first_row + i.
template <class T>
struct SampleJob {
  const T* means;                // (k, d)
  const double* cumulative;      // (k,) sums of weights, never falling, the last one at least 1
  const double *alpha, *std;     // (n,) or (1,)
  int64_t alpha_step, std_step;  // 1 or 0
  uint64_t seed;
  int64_t first_row, k, d;
  T* out;  // (n, d)
};

template <class T>
struct Kernels {
  int64_t block;                                      // B
  int64_t (*packed_size)(int64_t k, int64_t stride);  // numbers in all panels
  double (*pack)(const Components<T>&, T* packed);    // fills them, gives the radius
  void (*posterior)(const PosteriorJob<T>&, Work&, Arena&);
  void (*gram)(const Components<T>&, T* gram, int64_t k_pad, Work&, Arena&);
  void (*flow_fixed)(const FlowJob<T>&, Work&, Arena&);
  void (*flow_adaptive)(const FlowJob<T>&, Work&, Arena&);
  double (*diameter)(const Components<T>&, Work&, Arena&);  // of the rows in this worker's share of the triangle
  void (*sample)(const SampleJob<T>&, Work&, Arena&);
  void (*exp2)(const T* x, T* out, int64_t n);
};

struct Isa {
  const char* name;
  const Kernels<float>* float32;
  const Kernels<double>* float64;
};

}  // namespace flowfast
