#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "pool.hpp"

namespace flowfast {
namespace {

constexpr double kFlopsPerThread = 2e6;    // below this, waking another thread costs more than it saves
constexpr double kFlopsPerNormal = 50;     // roughly, of drawing one number
constexpr size_t kPackedBytes = 48 << 20;  // larger mixtures are packed panel by panel, unless a flow needs all panels
constexpr size_t kLargeOutput = 4 << 20;   // a larger one leaves the caches anyway
constexpr size_t kSecondCache = 1 << 19;   // panels that fit are read again for every block of points
constexpr int64_t kMaxStages = 16, kSampled = 1024;

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

// Owns what Components points to. centre: near the average of the means (of a sample of them), otherwise zero.
template <class T>
class Prepared : public Components<T> {
 public:
  Prepared(const T* means, const T* log_weights, int64_t k, int64_t d, bool centre, size_t packed_bytes)
      : Components<T>{means, log_weights, nullptr, nullptr, 0, k, d, (d + kColumns - 1) / kColumns * kColumns, 1} {
    if (std::all_of(log_weights, log_weights + k, [](T w) { return w == -std::numeric_limits<T>::infinity(); }))
      throw std::invalid_argument("log_weights: every component has weight 0; give one a positive weight");
    T* center = static_cast<T*>(arena_.take(size_t(this->stride) * sizeof(T)));
    std::vector<double> sum(size_t(this->stride), 0.0);
    const int64_t step = std::max<int64_t>(1, k / kSampled), count = (k + step - 1) / step;
    for (int64_t i = 0; centre && i < k; i += step)
      for (int64_t j = 0; j < d; ++j) sum[size_t(j)] += double(means[i * d + j]);
    for (int64_t j = 0; j < this->stride; ++j) center[j] = T(sum[size_t(j)] / double(count));
    this->center = center;
    const size_t bytes = size_t(kernels<T>().packed_size(k, this->stride)) * sizeof(T);
    this->group = bytes <= kSecondCache ? 1 : 8;
    if (bytes > packed_bytes) return;
    T* packed = static_cast<T*>(arena_.take(bytes));
    this->radius = kernels<T>().pack(*this, packed);
    this->packed = packed;
  }

 private:
  Arena arena_;
};

// (m, S + 1, S + 3): z_j = z + rho_j z + sum_l B_jl g_l with g_l = mubar(c_l z_l, r_l); row j holds rho_j, c_j, r_j,
// B_j., and row S the update of the step itself. The linear part a z of the field is folded in, in float64.
std::vector<double> step_table(const double* coefficients, const double* h, const double* tableau, int64_t m,
                               int64_t s) {
  std::vector<double> table(size_t(m * (s + 1) * (s + 3)), 0.0);
  for (int64_t i = 0; i < m; ++i) {
    double* rows = table.data() + i * (s + 1) * (s + 3);
    const double* stage = coefficients + i * s * 4;
    for (int64_t j = 0; j <= s; ++j) {
      double* row = rows + j * (s + 3);
      const double* butcher = tableau + (j < s ? j : s + 1) * s;
      for (int64_t l = 0; l < (j < s ? j : s); ++l) {
        const double weight = h[i] * butcher[l], a = stage[l * 4], *earlier = rows + l * (s + 3);
        row[0] += weight * a * (1 + earlier[0]);
        for (int64_t q = 0; q < l; ++q) row[3 + q] += weight * a * earlier[3 + q];
        row[3 + l] += weight * stage[l * 4 + 1];
      }
      if (j < s) row[1] = stage[j * 4 + 2], row[2] = stage[j * 4 + 3];
    }
  }
  return table;
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
  if (n == 0) return;
  const bool rows = job.output == Output::trace || job.output == Output::log_density;
  const int64_t width = job.output == Output::weights ? k : rows ? 1 : d;
  prefer_huge_pages(job.out, size_t(n * width) * sizeof(T));
  const Prepared<T> prepared(means, log_weights, k, d, true, job.output == Output::weights ? 0 : kPackedBytes);
  job.components = &prepared;
  threads = useful_threads(threads, 4.0 * double(n) * double(k) * double(d));
  // one core alone waits for such writes, several together save the reading of what they overwrite
  job.past_caches = threads > 1 && size_t(n * width) * sizeof(T) > kLargeOutput && uintptr_t(job.out) % 64 == 0 &&
                    width % kColumns == 0;
  // runs of blocks long enough to share panels and make the hand-out free, short enough to balance uneven workers
  const int64_t block = kernels<T>().block, blocks = (n + block - 1) / block;
  const int64_t grain =
      block * std::clamp<int64_t>(blocks / (prepared.group == 1 && blocks > 64 ? 8 * threads : threads), 1, 16);
  share(n, grain, threads, [&](Work& work, Arena& arena) { kernels<T>().posterior(job, work, arena); });
}

// Fixed steps where job.steps > 0, otherwise step-size control.
template <class T>
void flow(FlowJob<T> job, const T* means, const T* log_weights, const double* coefficients, const double* h, int64_t n,
          int64_t k, int64_t d, Form form, int threads) {
  const Kernels<T>& table = kernels<T>();
  if (job.stages < 1 || job.stages > kMaxStages)
    throw std::invalid_argument("tableau: got " + std::to_string(job.stages) + " stages, expected 1 to 16");
  if (n == 0) return;
  prefer_huge_pages(job.out, size_t(n * d) * sizeof(T));
  const Prepared<T> prepared(means, log_weights, k, d, false, std::numeric_limits<size_t>::max());
  Arena arena;
  job.components = &prepared;
  // in the span of the means an evaluation costs 2 k^2 flops instead of 4 k d
  if (form == Form::span || (form == Form::automatic && k < 2 * d)) {
    job.k_pad = (k + 15) / 16 * 16;
    T* gram = static_cast<T*>(arena.take(size_t(job.k_pad * job.k_pad) * sizeof(T)));
    std::fill(gram, gram + job.k_pad * job.k_pad, T(0));
    share(k, table.block, useful_threads(threads, 2.0 * double(k) * double(k) * double(d)),
          [&](Work& work, Arena& scratch) { table.gram(prepared, gram, job.k_pad, work, scratch); });
    job.gram = gram;
    T* columns = static_cast<T*>(arena.take(size_t((k + kRows - 1) / kRows * kRows * prepared.stride) * sizeof(T)));
    job.columns = columns;
    for (int64_t j = 0; j < d; j += kChunk) {
      const int64_t width = std::min(kChunk, prepared.stride - j);
      for (int64_t i = 0; i < (k + kRows - 1) / kRows * kRows; ++i, columns += width) {
        std::fill(columns, columns + width, T(0));
        if (i < k) std::copy(means + i * d + j, means + i * d + std::min(j + width, d), columns);
      }
    }
  }
  std::vector<double> steps;
  if (job.steps > 0) steps = step_table(coefficients, h, job.tableau, job.steps, job.stages);
  job.table = steps.data();
  const double evaluations = job.steps > 0 ? double(job.steps * job.stages) : 100;
  threads = useful_threads(threads, double(n) * evaluations * double(k) * double(std::min(2 * k, 4 * d)));
  share(n, table.block, threads, [&](Work& work, Arena& scratch) {
    job.steps > 0 ? table.flow_fixed(job, work, scratch) : table.flow_adaptive(job, work, scratch);
  });
}

template <class T>
double diameter(const T* means, int64_t k, int64_t d, int threads) {
  const std::vector<T> log_weights(size_t(k), T(0));
  const Prepared<T> prepared(means, log_weights.data(), k, d, true, kPackedBytes);
  threads = useful_threads(threads, double(k) * double(k) * double(d));
  std::vector<double> largest(size_t(threads), 0.0);
  Work work(k, kernels<T>().block * prepared.group);
  run_workers(threads, [&](int worker) {
    Arena arena;
    largest[size_t(worker)] = kernels<T>().diameter(prepared, work, arena);
  });
  return *std::max_element(largest.begin(), largest.end());
}

template <class T>
void sample(const SampleJob<T>& job, int64_t n, int threads) {
  if (n == 0) return;
  prefer_huge_pages(job.out, size_t(n * job.d) * sizeof(T));
  threads = useful_threads(threads, kFlopsPerNormal * double(n) * double(job.d));
  share(n, kernels<T>().block, threads, [&](Work& work, Arena& arena) { kernels<T>().sample(job, work, arena); });
}

#define FLOWFAST_INSTANTIATE(T)                                                                                     \
  template void posterior(PosteriorJob<T>, const T*, const T*, int64_t, int64_t, int64_t, int);                     \
  template void flow(FlowJob<T>, const T*, const T*, const double*, const double*, int64_t, int64_t, int64_t, Form, \
                     int);                                                                                          \
  template double diameter(const T*, int64_t, int64_t, int);                                                        \
  template void sample(const SampleJob<T>&, int64_t, int);
FLOWFAST_INSTANTIATE(float)
FLOWFAST_INSTANTIATE(double)

}  // namespace flowfast
