// The CPU teacher without Python: pointers and sizes in, results in the caller's memory.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace flowfast {

// Instruction set in use: FLOWFAST_ISA where set, otherwise the best one this CPU has. Throws std::invalid_argument on
// a FLOWFAST_ISA that is unknown or not supported here.
const Isa& isa();
std::vector<std::string> supported_isas();

template <class T>
const Kernels<T>& kernels();

enum class Form { automatic, span, full };

// means (k, d), log_weights (k,); job.components is filled in. Threads: at most this many, fewer for little work.
template <class T>
void posterior(PosteriorJob<T> job, const T* means, const T* log_weights, int64_t n, int64_t k, int64_t d, int threads);

// job.tableau (S + 3, S). job.steps > 0: fixed steps with coefficients (m, S, 4), a, b, c, r of every stage, and h
// (m,). Otherwise an embedded pair with step-size control.
template <class T>
void flow(FlowJob<T> job, const T* means, const T* log_weights, const double* coefficients, const double* h, int64_t n,
          int64_t k, int64_t d, Form form, int threads);

// max_ij |means_i - means_j|, relative error a few eps of T
template <class T>
double diameter(const T* means, int64_t k, int64_t d, int threads);

template <class T>
void sample(const SampleJob<T>& job, int64_t n, int threads);

}  // namespace flowfast
