// The kernels without Python, for sanitizers: every buffer a caller hands over lies against an inaccessible page, once
// with its end and once with its beginning, at every size 1 .. 65 of n, k and d, for every instruction set of this CPU.
// Outputs start as NaN, so that a forgotten element is seen. `threads` instead works the pool, for TSan; `planted`
// writes one element too far and must fail. Run by `make sanitize`.
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/engine.hpp"
#include "../../csrc/pool.hpp"

using namespace flowfast;

namespace {

enum class Against { end, beginning };  // which guard page the data touch

template <class T>
class Guarded {
 public:
  Guarded(int64_t count, Against side) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    const size_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (inner && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE))) std::abort();
    data_ = reinterpret_cast<T*>(base_ + page + (side == Against::end ? inner - bytes : 0));
    for (int64_t i = 0; i < count; ++i) data_[i] = std::is_integral_v<T> ? T(-1) : T(NAN);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  size_t size_;
  char* base_;
  T* data_;
};

void require(bool holds, const char* what, int64_t n, int64_t k, int64_t d) {
  if (holds) return;
  std::fprintf(stderr, "%s, %s: wrong at n = %d, k = %d, d = %d\n", isa().name, what, int(n), int(k), int(d));
  std::_Exit(1);
}

// Numbers in (-1, 1), the same for every case.
double next(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state) >> 11) * 0x1p-52;
}

// Classical Runge-Kutta (fixed) and Bogacki-Shampine 3(2), last stage reused (adaptive): A, nodes, b, error weights.
const double kClassical[] = {0,   0, 0, 0,  .5, 0, 0,      0,      0,      .5,     0, 0, 0, 0,
                             1.0, 0, 0, .5, .5, 1, 1. / 6, 1. / 3, 1. / 3, 1. / 6, 0, 0, 0, 0};
const double kEmbedded[] = {0,      0, 0, 0,  .5,  0, 0,      0,      0,      .75, 0,        0,       2. / 9, 1. / 3,
                            4. / 9, 0, 0, .5, .75, 1, 2. / 9, 1. / 3, 4. / 9, 0,   -5. / 72, 1. / 12, 1. / 9, -.125};

template <class T>
struct Case {
  const int64_t n, k, d;
  const Against side;
  Guarded<T> x{n * d, side}, v{n * d, side}, means{k * d, side}, log_weights{k, side};
  Guarded<double> alpha{n, side}, std{n, side}, center{d, side}, ends{4 * n, side};
  uint64_t seed = 1;
  std::vector<T> results;  // of every operation, in order

  Case(int64_t n_, int64_t k_, int64_t d_, Against side_) : n(n_), k(k_), d(d_), side(side_) {
    for (int64_t i = 0; i < n * d; ++i) x[i] = T(3 * next(seed)), v[i] = T(next(seed));
    for (int64_t i = 0; i < k * d; ++i) means[i] = T(5 * next(seed));
    for (int64_t i = 0; i < k; ++i) log_weights[i] = T(-std::log(double(k)));
    for (int64_t j = 0; j < d; ++j) center[j] = next(seed);
    for (int64_t i = 0; i < n; ++i) {
      alpha[i] = 0.5 + 0.4 * next(seed), std[i] = 0.3 + 0.2 * next(seed);
      ends[i] = 0.1, ends[n + i] = 0.9, ends[2 * n + i] = 1 + next(seed), ends[3 * n + i] = 0.5;
    }
  }

  void keep(Guarded<T>& out, const char* name) {
    for (int64_t i = 0; i < out.size(); ++i) require(std::isfinite(out[i]), name, n, k, d);
    results.insert(results.end(), out.data(), out.data() + out.size());
  }

  void pointwise(int threads) {
    const std::pair<Output, int64_t> outputs[] = {{Output::log_density, n},        {Output::score, n * d},
                                                  {Output::posterior_mean, n * d}, {Output::trace, n},
                                                  {Output::weights, n * k},        {Output::hvp, n * d}};
    for (const auto& [output, size] : outputs) {
      Guarded<T> out(size, side);
      PosteriorJob<T> job{};
      job.output = output, job.out = out.data(), job.x = x.data(), job.v = v.data();
      job.alpha = alpha.data(), job.std = std.data(), job.alpha_step = job.std_step = 1;
      posterior(job, means.data(), log_weights.data(), n, k, d, threads);
      keep(out, "posterior");
    }
  }

  FlowJob<T> flow_job(Guarded<T>& out, Guarded<double>& tableau) {
    FlowJob<T> job{};
    job.x = x.data(), job.out = out.data(), job.center = center.data(), job.tableau = tableau.data();
    for (int row = 0; row < 4; ++row) job.ends[row] = ends.data() + row * n;
    job.ends_step = 1, job.stages = 4;
    return job;
  }

  void flows(Form form, int threads) {
    constexpr int64_t m = 2;
    Guarded<T> fixed(n * d, side), adaptive(n * d, side);
    Guarded<double> classical(28, side), embedded(28, side), h(m, side), coefficients(m * 4 * 4, side);
    std::memcpy(classical.data(), kClassical, sizeof kClassical);
    std::memcpy(embedded.data(), kEmbedded, sizeof kEmbedded);
    for (int64_t i = 0; i < m; ++i) h[i] = 0.1;
    for (int64_t i = 0; i < m * 16; ++i) coefficients[i] = i % 4 == 0 ? -0.1 : 0.7;
    Guarded<int8_t> status(n, side);
    FlowJob<T> job = flow_job(fixed, classical);
    job.steps = m, job.status = status.data();
    flow<T>(job, means.data(), log_weights.data(), coefficients.data(), h.data(), n, k, d, form, threads);
    keep(fixed, "flow_fixed");
    for (int64_t i = 0; i < n; ++i) require(status[i] == 0, "status of fixed steps", n, k, d);
    Guarded<int32_t> attempts(n, side), evaluations(n, side);
    job = flow_job(adaptive, embedded);
    job.rtol = 1e-2, job.atol = 1e-3, job.max_steps = 500;
    job.status = status.data(), job.attempts = attempts.data(), job.evaluations = evaluations.data();
    flow<T>(job, means.data(), log_weights.data(), nullptr, nullptr, n, k, d, form, threads);
    keep(adaptive, "flow_adaptive");
    for (int64_t i = 0; i < n; ++i) require(status[i] == 0 && attempts[i] > 0, "status", n, k, d);
  }

  void draws(int threads) {
    Guarded<double> cumulative(k, side);
    Guarded<T> out(n * d, side);
    for (int64_t i = 0; i < k; ++i) cumulative[i] = double(i + 1) / double(k);
    SampleJob<T> job{};
    job.means = means.data(), job.cumulative = cumulative.data(), job.alpha = alpha.data(), job.std = std.data();
    job.alpha_step = job.std_step = 1;
    job.seed = 7, job.first_row = 5, job.k = k, job.d = d, job.out = out.data();
    sample(job, n, threads);
    keep(out, "sample");
  }

  void everything(int threads) {
    pointwise(threads), draws(threads);
    flows(Form::span, threads), flows(Form::full, threads);
    require(std::isfinite(diameter(means.data(), k, d, threads)), "diameter", n, k, d);
    Guarded<T> out(n, side), negative(n, side);
    for (int64_t i = 0; i < n; ++i) negative[i] = T(-double(i));
    kernels<T>().exp2(negative.data(), out.data(), n);
    keep(out, "exp2");
  }
};

// The same numbers against either page: a kernel that reads beyond its data would use different ones.
template <class T>
void check(int64_t n, int64_t k, int64_t d) {
  std::vector<T> results[2];
  for (Against side : {Against::end, Against::beginning}) {
    Case<T> one(n, k, d, side);
    one.everything(1);
    results[side == Against::end] = one.results;
  }
  require(std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(T)) == 0, "bits", n, k, d);
}

template <class T>
void work_pool() {
  constexpr int64_t n = 1500, k = 40, d = 16;
  Case<T> one(n, k, d, Against::end);
  auto run = [&](int threads) {
    one.results.clear();
    one.pointwise(threads), one.draws(threads), one.flows(Form::span, threads), one.flows(Form::full, threads);
    return one.results;
  };
  const std::vector<T> want = run(1);
  for (int threads : {2, 3, 8, 2}) {
    const std::vector<T> got = run(threads);
    require(std::memcmp(got.data(), want.data(), want.size() * sizeof(T)) == 0, "bits of several threads", n, k, d);
  }
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([] {
      Case<T> own(n, k, d, Against::beginning);
      for (int round = 0; round < 5; ++round) own.pointwise(3);
    });
  for (std::thread& caller : callers) caller.join();
}

// Quotas of a container as the kernel writes them: the tightest of a group and its parents, rounded up.
void check_quota() {
  char root[] = "/tmp/flowfast-XXXXXX";
  require(mkdtemp(root) != nullptr, "mkdtemp", 0, 0, 0);
  const std::string group = root + std::string("/job");
  mkdir(group.c_str(), 0700);
  const auto cpus = [&](const char* outer, const char* inner) {
    std::ofstream(root + std::string("/cpu.max")) << outer;
    std::ofstream(group + "/cpu.max") << inner;
    return quota_cpus(root, "/job");
  };
  require(cpus("max 100000\n", "max 100000\n") == kManyCpus, "no quota", 0, 0, 0);
  require(cpus("max 100000\n", "150000 100000\n") == 2, "quota", 0, 0, 0);
  require(cpus("100000 100000\n", "400000 100000\n") == 1, "quota of the parent", 0, 0, 0);
  std::filesystem::remove_all(root);
}

void check_set(const std::string& mode) {
  if (mode == "threads") return check_quota(), work_pool<float>(), work_pool<double>();
  for (int64_t size = 1; size <= 65; ++size) {
    check<float>(size, 5, 7), check<float>(3, size, 6), check<float>(3, 7, size);
    check<double>(size, 5, 7), check<double>(3, size, 6), check<double>(3, 7, size);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "planted") Guarded<float>(3, Against::end)[3] = 1;
  for (const std::string& name : supported_isas()) {
    const pid_t child = fork();  // the instruction set is chosen once per process
    if (child == 0) {
      setenv("FLOWFAST_ISA", name.c_str(), 1);
      check_set(mode);
      return 0;
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status != 0) return std::fprintf(stderr, "%s failed\n", name.c_str()), 1;
    std::printf("%s: clean\n", name.c_str()), std::fflush(stdout);
  }
  return 0;
}
