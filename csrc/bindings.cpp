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
void bind_posterior(Address x, Address v, Address means, Address log_weights, Address alpha, bool alpha_per_row,
                    Address std, bool std_per_row, Address log_density, Address score, Address posterior_mean,
                    Address trace, Address weights, Address hvp, int64_t n, int64_t k, int64_t d, int threads) {
  PosteriorJob<T> job{
      nullptr,     to<const T>(x),     to<const T>(v), to<const double>(alpha), to<const double>(std), alpha_per_row,
      std_per_row, to<T>(log_density), to<T>(score),   to<T>(posterior_mean),   to<T>(trace),          to<T>(weights),
      to<T>(hvp)};
  posterior<T>(job, to<const T>(means), to<const T>(log_weights), n, k, d, threads);
}

template <class T>
FlowJob<T> flow_job(Address x, Address out, Address center, Address ends, bool ends_per_row, Address tableau,
                    int64_t stages, int64_t n) {
  FlowJob<T> job{};
  job.x = to<const T>(x), job.out = to<T>(out), job.center = to<const double>(center);
  for (int row = 0; row < 4; ++row) job.ends[row] = to<const double>(ends) + row * (ends_per_row ? n : 1);
  job.ends_step = ends_per_row, job.tableau = to<const double>(tableau), job.stages = stages;
  return job;
}

template <class T>
void bind_flow_fixed(Address x, Address out, Address means, Address log_weights, Address center, Address ends,
                     bool ends_per_row, Address h, Address coefficients, Address tableau, int64_t stages, int64_t steps,
                     int64_t n, int64_t k, int64_t d, Form form, int threads) {
  FlowJob<T> job = flow_job<T>(x, out, center, ends, ends_per_row, tableau, stages, n);
  job.steps = steps;
  flow_fixed<T>(job, to<const T>(means), to<const T>(log_weights), to<const double>(coefficients), to<const double>(h),
                n, k, d, form, threads);
}

template <class T>
void bind_flow_adaptive(Address x, Address out, Address status, Address attempts, Address evaluations, Address means,
                        Address log_weights, Address center, Address ends, bool ends_per_row, Address tableau,
                        int64_t stages, double rtol, double atol, int32_t max_steps, int64_t n, int64_t k, int64_t d,
                        Form form, int threads) {
  FlowJob<T> job = flow_job<T>(x, out, center, ends, ends_per_row, tableau, stages, n);
  job.rtol = rtol, job.atol = atol, job.max_steps = max_steps;
  job.status = to<int8_t>(status), job.attempts = to<int32_t>(attempts), job.evaluations = to<int32_t>(evaluations);
  flow_adaptive<T>(job, to<const T>(means), to<const T>(log_weights), n, k, d, form, threads);
}

template <class T>
double bind_diameter(Address means, int64_t k, int64_t d, int threads) {
  return diameter<T>(to<const T>(means), k, d, threads);
}

template <class T>
void bind_exponential(Address x, Address out, int64_t n) {
  kernels<T>().exponential(to<const T>(x), to<T>(out), n);
}

template <class T>
void bind_all(py::module_& m, const std::string& dtype) {
  const py::call_guard<py::gil_scoped_release> released;
  m.def(("posterior_" + dtype).c_str(), bind_posterior<T>, released);
  m.def(("flow_fixed_" + dtype).c_str(), bind_flow_fixed<T>, released);
  m.def(("flow_adaptive_" + dtype).c_str(), bind_flow_adaptive<T>, released);
  m.def(("diameter_" + dtype).c_str(), bind_diameter<T>, released);
  m.def(("exponential_" + dtype).c_str(), bind_exponential<T>, released);
  m.def(("block_" + dtype).c_str(), [] { return kernels<T>().block; });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::enum_<Form>(m, "Form").value("automatic", Form::automatic).value("span", Form::span).value("full", Form::full);
  m.def("isa", [] { return std::string(isa().name); });
  m.def("isas", supported_isas);
  bind_all<float>(m, "float32");
  bind_all<double>(m, "float64");
}

}  // namespace flowfast
