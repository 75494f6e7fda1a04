// Components in the layout the kernels read, and the step tables of the fixed-step flow.
#pragma once
#include <vector>

#include "pool.hpp"

namespace flowfast {

// Owns what Components points to. Components of log-weight -inf are dropped. centre: subtract the mean of the rest.
template <class T>
class Prepared {
 public:
  Prepared(const T* means, const T* log_weights, int64_t k, int64_t d, bool centre);
  const Components<T>& components() const { return view_; }

 private:
  Components<T> view_{};
  Arena arena_;
  std::vector<int64_t> index_;
  std::vector<double> center_;
};

// (m, S + 1, S + 3): z_j = z + rho_j z + sum_l B_jl g_l with g_l = mubar(c_l z_l, r_l); row j holds rho_j, c_j, r_j,
// B_j., and row S the update of the step itself. The linear part a z of the field is folded in, in float64.
std::vector<double> step_table(const double* coefficients, const double* h, const double* tableau, int64_t m,
                               int64_t s);

}  // namespace flowfast
