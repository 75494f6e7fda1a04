// Chooses the instruction set, once per process.
#include <cstdlib>
#include <stdexcept>

#include "engine.hpp"

namespace flowfast {

#define FLOWFAST_DECLARE(set) \
  namespace set {             \
  extern const Isa kernels;   \
  }
FLOWFAST_DECLARE(generic)
#if defined(__x86_64__)
FLOWFAST_DECLARE(avx2)
FLOWFAST_DECLARE(avx512)
#endif

namespace {

// Best first.
std::vector<const Isa*> usable() {
  std::vector<const Isa*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512::kernels);
  if (fma) sets.push_back(&avx2::kernels);
#endif
  sets.push_back(&generic::kernels);
  return sets;
}

const Isa& choose() {
  const char* forced = std::getenv("FLOWFAST_ISA");
  if (!forced || !*forced) return *usable().front();
  std::string names;
  for (const Isa* set : usable()) {
    if (std::string(forced) == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("FLOWFAST_ISA: got '" + std::string(forced) + "', this CPU supports " + names +
                              "; unset it to use the best one");
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* set : usable()) names.emplace_back(set->name);
  return names;
}

}  // namespace flowfast
