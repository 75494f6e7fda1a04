// What this machine can do at most: prints one JSON object of rates for the number of threads given.
// FMA in flop/s and exp in values/s per dtype, from registers alone; copy, read and fill of memory in bytes copied,
// read and written per second, with stores that pass the caches by where there are any; fresh fills new pages.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T>
using Vec __attribute__((vector_size(kBytes))) = T;
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = std::int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Bits<double> {
  using Int = std::int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

// Hides a value from the optimiser without a trip through memory.
template <class V>
inline void keep(V& value) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

// As if somebody read what the address leads to.
inline void keep_memory(void* address) { asm volatile("" : : "r"(address) : "memory"); }

template <class T>
double fma_work(std::int64_t rounds) {
  constexpr int kChains = 12;
  Vec<T> sums[kChains] = {}, a = Vec<T>{} + T(0.999), b = Vec<T>{} + T(0.001);
  keep(a);
  keep(b);
  for (auto& sum : sums) keep(sum);  // or equal chains are computed once
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) sums[j] = sums[j] * a + b;
  }
  for (auto& sum : sums) keep(sum);
  return 2.0 * kChains * (kBytes / sizeof(T)) * double(rounds);
}

// exp by 2^n times a polynomial, degree enough for the dtype; no special cases, as a softmax needs none.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
  using Int = typename Bits<T>::Int;
  constexpr int kDegree = sizeof(T) == 4 ? 6 : 11;
  const T magic = T(3) * T(Int(1) << (Bits<T>::kMantissa - 1));
  Vec<T> shifted = x * T(1.4426950408889634) + magic;
  Vec<T> r = x - (shifted - magic) * T(0.6931471805599453);
  T factor = 1;
  T coefficients[kDegree + 1];
  for (int i = 0; i <= kDegree; ++i, factor /= T(i)) coefficients[i] = factor;
  Vec<T> sum = Vec<T>{} + coefficients[kDegree];
#pragma GCC unroll 12
  for (int i = kDegree - 1; i >= 0; --i) sum = sum * r + coefficients[i];
  using IntVec __attribute__((vector_size(kBytes))) = Int;
  IntVec scale = ((IntVec)shifted << Bits<T>::kMantissa) + (Int(Bits<T>::kBias) << Bits<T>::kMantissa);
  return sum * (Vec<T>)scale;
}

template <class T>
double exp_work(std::int64_t rounds) {
  constexpr int kChains = 8;
  Vec<T> sums[kChains] = {}, x = Vec<T>{} - T(0.5);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kChains; ++j) {
      keep(x);
      sums[j] += exponential<T>(x);
    }
  }
  for (auto& sum : sums) keep(sum);
  return double(kChains) * (kBytes / sizeof(T)) * double(rounds);
}

// A buffer of each thread, far larger than the caches.
struct Arrays {
  static constexpr std::size_t kSize = std::size_t(64) << 20;
  std::vector<char> from = std::vector<char>(kSize, 1), to = std::vector<char>(kSize, 2);
};

Arrays& arrays() {
  thread_local Arrays own;
  return own;
}

using Quad __attribute__((vector_size(16))) = float;

inline void stream(Quad* at, Quad value) {
#if defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(at), value);
#else
  *at = value;
#endif
}

// Streams `value`, or a copy where it is null.
double stream_work(std::int64_t rounds, const Quad* value) {
  const Quad* from = reinterpret_cast<const Quad*>(arrays().from.data());
  Quad* to = reinterpret_cast<Quad*>(arrays().to.data());
  for (std::int64_t i = 0; i < rounds; ++i)
    for (std::size_t j = 0; j < Arrays::kSize / sizeof(Quad); ++j) stream(to + j, value ? *value : from[j]);
  return double(Arrays::kSize) * double(rounds);
}

double stream_copy_work(std::int64_t rounds) { return stream_work(rounds, nullptr); }

double fill_work(std::int64_t rounds) {
  const Quad value = {0.1f, 0.2f, 0.3f, 0.4f};
  return stream_work(rounds, &value);
}

double copy_work(std::int64_t rounds) {
  for (std::int64_t i = 0; i < rounds; ++i) std::memcpy(arrays().to.data(), arrays().from.data(), Arrays::kSize);
  return double(Arrays::kSize) * double(rounds);
}

// Fills memory that the system has yet to hand out: the page faults of a fresh output.
double fresh_work(std::int64_t rounds) {
  for (std::int64_t i = 0; i < rounds; ++i) {
    std::unique_ptr<char[]> fresh(new char[Arrays::kSize]);
    std::memset(fresh.get(), 1, Arrays::kSize);
    keep_memory(fresh.get());
  }
  return double(Arrays::kSize) * double(rounds);
}

double read_work(std::int64_t rounds) {
  constexpr int kChains = 8;
  Quad sums[kChains] = {};
  const Quad* from = reinterpret_cast<const Quad*>(arrays().from.data());
  for (std::int64_t i = 0; i < rounds; ++i)
    for (std::size_t j = 0; j < Arrays::kSize / sizeof(Quad); j += kChains)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain) sums[chain] += from[j + chain];
  for (auto& sum : sums) keep(sum);
  return double(Arrays::kSize) * double(rounds);
}

// Best of several rounds: the sum over threads of the work of one, over the time of the slowest.
double rate(double (*work)(std::int64_t), int threads, std::int64_t rounds, int repeats) {
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i)
      pool.emplace_back([&, i] {
        work(1);
        const auto start = std::chrono::steady_clock::now();
        const double done = work(rounds);
        rates[i] = done / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
    for (auto& thread : pool) thread.join();
    best = std::max(best, *std::min_element(rates.begin(), rates.end()) * threads);
  }
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("{\"fma_float32\": %.4g, \"fma_float64\": %.4g, \"exp_float32\": %.4g, \"exp_float64\": %.4g, ",
              rate(fma_work<float>, threads, 8000000, 8), rate(fma_work<double>, threads, 8000000, 8),
              rate(exp_work<float>, threads, 3000000, 5), rate(exp_work<double>, threads, 2000000, 5));
  std::printf("\"copy_bytes\": %.4g, \"read_bytes\": %.4g, \"fill_bytes\": %.4g, \"fresh_bytes\": %.4g}\n",
              std::max(rate(copy_work, threads, 4, 5), rate(stream_copy_work, threads, 4, 5)),
              rate(read_work, threads, 4, 5), rate(fill_work, threads, 4, 5), rate(fresh_work, threads, 4, 5));
}
