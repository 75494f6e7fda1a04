#include "engine.hpp"

#include <algorithm>
#include <stdexcept>

#include "prepare.hpp"

namespace flowfast {
namespace {

constexpr double kFlopsPerThread = 2e6;  // below this, waking another thread costs more than it saves
constexpr int64_t kMaxStages = 16;

int useful_threads(int threads, double flops) {
  return std::max(1, int(std::min<double>(threads, flops / kFlopsPerThread)));
}

// Runs kernel(work, arena) on every worker, rows handed out in runs of grain.
template <class Kernel>
void share(int64_t rows, int64_t grain, int threads, const Kernel& kernel) {
  Work work(rows, grain);
  run_workers(threads, [&](int) {
    Arena arena;
    kernel(work, arena);
  });
}

// A run of blocks long enough to make the hand-out free, short enough to balance uneven workers.
int64_t run_length(int64_t n, int64_t block, int threads) {
  const int64_t blocks = (n + block - 1) / block;
  return block * std::clamp<int64_t>(blocks / (8 * threads), 1, 16);
}

// The Gram matrix where the flow is cheaper in the span of the means (2 k^2 flops per evaluation instead of 4 k d).
template <class T>
T* make_gram(const Components<T>& c, Form form, int threads, FlowJob<T>& job, Arena& arena) {
  if (form == Form::full || (form == Form::automatic && c.k >= 2 * c.d)) return nullptr;
  job.gram_stride = (c.k_pad + kPadColumns - 1) / kPadColumns * kPadColumns;
  T* gram = static_cast<T*>(arena.take(size_t(c.k_pad * job.gram_stride) * sizeof(T)));
  std::fill(gram, gram + c.k_pad * job.gram_stride, T(0));
  const Kernels<T>& table = kernels<T>();
  share(c.k_pad, table.block, useful_threads(threads, 2.0 * double(c.k_pad) * double(c.k_pad) * double(c.d)),
        [&](Work& work, Arena& scratch) { table.gram(c, gram, job.gram_stride, work, scratch); });
  return gram;
}

void check_stages(int64_t stages) {
  if (stages < 1 || stages > kMaxStages)
    throw std::invalid_argument("tableau: got " + std::to_string(stages) + " stages, expected 1 to 16");
}

double flow_flops(int64_t n, int64_t k, int64_t d, double evaluations) {
  return double(n) * evaluations * double(k) * double(std::min(2 * k, 4 * d));
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *isa().float32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *isa().float64;
}

template <class T>
void posterior(PosteriorJob<T> job, const T* means, const T* log_weights, int64_t n, int64_t k, int64_t d,
               int threads) {
  const Kernels<T>& table = kernels<T>();
  if (n == 0) return;
  const Prepared<T> prepared(means, log_weights, k, d, true);
  job.components = &prepared.components();
  threads = useful_threads(threads, 4.0 * double(n) * double(k) * double(d));
  share(n, run_length(n, table.block, threads), threads,
        [&](Work& work, Arena& arena) { table.posterior(job, work, arena); });
}

template <class T>
void flow_fixed(FlowJob<T> job, const T* means, const T* log_weights, const double* coefficients, const double* h,
                int64_t n, int64_t k, int64_t d, Form form, int threads) {
  const Kernels<T>& table = kernels<T>();
  check_stages(job.stages);
  if (n == 0) return;
  const Prepared<T> prepared(means, log_weights, k, d, false);
  const std::vector<double> steps = step_table(coefficients, h, job.tableau, job.steps, job.stages);
  Arena arena;
  job.components = &prepared.components();
  job.table = steps.data();
  job.gram = make_gram(prepared.components(), form, threads, job, arena);
  threads = useful_threads(threads, flow_flops(n, k, d, double(job.steps * job.stages)));
  share(n, table.block, threads, [&](Work& work, Arena& scratch) { table.flow_fixed(job, work, scratch); });
}

template <class T>
void flow_adaptive(FlowJob<T> job, const T* means, const T* log_weights, int64_t n, int64_t k, int64_t d, Form form,
                   int threads) {
  const Kernels<T>& table = kernels<T>();
  check_stages(job.stages);
  if (n == 0) return;
  const Prepared<T> prepared(means, log_weights, k, d, false);
  Arena arena;
  job.components = &prepared.components();
  job.gram = make_gram(prepared.components(), form, threads, job, arena);
  threads = useful_threads(threads, flow_flops(n, k, d, 100));
  share(n, 1, threads, [&](Work& work, Arena& scratch) { table.flow_adaptive(job, work, scratch); });
}

template <class T>
double diameter(const T* means, int64_t k, int64_t d, int threads) {
  const Kernels<T>& table = kernels<T>();
  const std::vector<T> log_weights(size_t(k), T(0));
  const Prepared<T> prepared(means, log_weights.data(), k, d, true);
  threads = useful_threads(threads, double(k) * double(k) * double(d));
  std::vector<double> largest(size_t(threads), 0.0);
  Work work(k, table.block);
  run_workers(threads, [&](int worker) {
    Arena arena;
    largest[size_t(worker)] = table.diameter(prepared.components(), work, arena);
  });
  return *std::max_element(largest.begin(), largest.end());
}

#define FLOWFAST_INSTANTIATE(T)                                                                                     \
  template void posterior(PosteriorJob<T>, const T*, const T*, int64_t, int64_t, int64_t, int);                     \
  template void flow_fixed(FlowJob<T>, const T*, const T*, const double*, const double*, int64_t, int64_t, int64_t, \
                           Form, int);                                                                              \
  template void flow_adaptive(FlowJob<T>, const T*, const T*, int64_t, int64_t, int64_t, Form, int);                \
  template double diameter(const T*, int64_t, int64_t, int);
FLOWFAST_INSTANTIATE(float)
FLOWFAST_INSTANTIATE(double)

}  // namespace flowfast
