// The kernels of one instruction set. Compiled once per set with its own flags and its own FLOWFAST_ISA.
#include "flow_adaptive.hpp"
#include "sampling.hpp"
#include "weights.hpp"

#define FLOWFAST_TEXT(name) #name
#define FLOWFAST_NAME(name) FLOWFAST_TEXT(name)

namespace flowfast::FLOWFAST_ISA {
namespace {

template <class T>
void pointwise(const PosteriorJob<T>& job, Work& work, Arena& arena) {
  job.output == Output::weights ? weights<T>(job, work, arena) : posterior<T>(job, work, arena);
}

template <class T>
void fixed(const FlowJob<T>& job, Work& work, Arena& arena) {
  job.gram ? flow_fixed<T, true>(job, work, arena) : flow_fixed<T, false>(job, work, arena);
}

template <class T>
void adaptive(const FlowJob<T>& job, Work& work, Arena& arena) {
  job.gram ? Adaptive<T, true>(job, work, arena).run() : Adaptive<T, false>(job, work, arena).run();
}

template <class T>
constexpr Kernels<T> table{B<T>,     packed_size<T>, pack<T>,     pointwise<T>, gram<T>,
                           fixed<T>, adaptive<T>,    diameter<T>, sample<T>,    exp2_array<T>};

}  // namespace

extern const Isa kernels;
const Isa kernels{FLOWFAST_NAME(FLOWFAST_ISA), &table<float>, &table<double>};

}  // namespace flowfast::FLOWFAST_ISA
