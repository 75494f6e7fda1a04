// Python bindings: addresses of tensors (0 = not wanted) and sizes; flowfast/_cpp.py is the only caller. The GIL is
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine.hpp"

namespace py = pybind11;

namespace flowfast {
namespace {

using Address = uintptr_t;

template <class P>
P* to(Address address) {
  return reinterpret_cast<P*>(address);
}

template <class T>
void bind_posterior(Output output, Address out, Address x, Address v, Address means, Address log_weights, Address alpha,
                    bool alpha_per_row, Address std, bool std_per_row, int64_t n, int64_t k, int64_t d, int threads) {
  PosteriorJob<T> job{};
  job.output = output, job.out = to<T>(out), job.x = to<const T>(x), job.v = to<const T>(v);
  job.alpha = to<const double>(alpha), job.std = to<const double>(std);
  job.alpha_step = alpha_per_row, job.std_step = std_per_row;
  posterior<T>(job, to<const T>(means), to<const T>(log_weights), n, k, d, threads);
}

// Fixed steps where steps > 0, from h and coefficients; otherwise step-size control.
template <class T>
void bind_flow(Address x, Address out, Address means, Address log_weights, Address center, Address ends,
               bool ends_per_row, Address tableau, int64_t stages, int64_t steps, Address h, Address coefficients,
               double rtol, double atol, int32_t max_steps, Address status, Address attempts, Address evaluations,
               int64_t n, int64_t k, int64_t d, Form form, int threads) {
  FlowJob<T> job{};
  job.x = to<const T>(x), job.out = to<T>(out), job.center = to<const double>(center);
  for (int row = 0; row < 4; ++row) job.ends[row] = to<const double>(ends) + row * (ends_per_row ? n : 1);
  job.ends_step = ends_per_row, job.tableau = to<const double>(tableau), job.stages = stages, job.steps = steps;
  job.rtol = rtol, job.atol = atol, job.max_steps = max_steps;
  job.status = to<int8_t>(status), job.attempts = to<int32_t>(attempts), job.evaluations = to<int32_t>(evaluations);
  flow<T>(job, to<const T>(means), to<const T>(log_weights), to<const double>(coefficients), to<const double>(h), n, k,
          d, form, threads);
}

template <class T>
double bind_diameter(Address means, int64_t k, int64_t d, int threads) {
  return diameter<T>(to<const T>(means), k, d, threads);
}

template <class T>
void bind_sample(Address out, Address means, Address cumulative, Address alpha, bool alpha_per_row, Address std,
                 bool std_per_row, uint64_t seed, int64_t first_row, int64_t n, int64_t k, int64_t d, int threads) {
  SampleJob<T> job{};
  job.means = to<const T>(means), job.cumulative = to<const double>(cumulative), job.out = to<T>(out);
  job.alpha = to<const double>(alpha), job.std = to<const double>(std);
  job.alpha_step = alpha_per_row, job.std_step = std_per_row;
  job.seed = seed, job.first_row = first_row, job.k = k, job.d = d;
  sample<T>(job, n, threads);
}

template <class T>
void bind_exp2(Address x, Address out, int64_t n) {
  kernels<T>().exp2(to<const T>(x), to<T>(out), n);
}

template <class T>
void bind_all(py::module_& m, const std::string& dtype) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(("posterior_" + dtype).c_str(), bind_posterior<T>, released);
  m.def(("flow_" + dtype).c_str(), bind_flow<T>, released);
  m.def(("diameter_" + dtype).c_str(), bind_diameter<T>, released);
  m.def(("sample_" + dtype).c_str(), bind_sample<T>, released);
  m.def(("exp2_" + dtype).c_str(), bind_exp2<T>, released);
  m.def(("block_" + dtype).c_str(), [] { return kernels<T>().block; });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::enum_<Form>(m, "Form").value("automatic", Form::automatic).value("span", Form::span).value("full", Form::full);
  py::enum_<Output>(m, "Output")
      .value("log_density", Output::log_density)
      .value("score", Output::score)
      .value("posterior_mean", Output::posterior_mean)
      .value("covariance_trace", Output::trace)
      .value("posterior_weights", Output::weights)
      .value("hessian_vector_product", Output::hvp);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("isas", supported_isas);
  bind_all<float>(m, "float32");
  bind_all<double>(m, "float64");
}

}  // namespace flowfast
