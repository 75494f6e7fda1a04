// Normal numbers as functions of a counter: Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform.
#pragma once
#include "simd.hpp"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace flowfast::FLOWFAST_ISA {

using Wide = Simd<double>::Bits;  // words of 32 bits in lanes of 64
template <class T>
using Bits = typename Simd<T>::Bits;
constexpr uint64_t kWord = 0xFFFFFFFF;

// products of the lower halves
inline Wide product(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_maskz_mul_epu32(__mmask8(-1), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & kWord) * (b & kWord);
#endif
}

// words[0 .. 3] <- the block of counter (row mod 2^32, row / 2^32, third, fourth) under the key `seed`, one row per
// lane of T. Rows of float come in two registers, even lanes first.
template <class T>
inline void philox(const Wide* row, uint32_t third, uint32_t fourth, uint64_t seed, Bits<T>* words) {
  const Wide one = Wide{} + 0xD2511F53u, two = Wide{} + 0xCD9E8D57u;
  for (int half = 0; half < W<T> / W<double>; ++half) {
    Wide c[4] = {row[half], row[half] >> 32, Wide{} + third, Wide{} + fourth};  // what is above a word is never read
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      const Wide a = product(c[0], one), b = product(c[2], two);
      c[0] = (b >> 32) ^ c[1] ^ low, c[1] = b, c[2] = (a >> 32) ^ c[3] ^ high, c[3] = a;
    }
    for (int i = 0; i < 4; ++i) {
      const Wide placed = half ? c[i] << 32 : c[i] & kWord;
      words[i] = half ? words[i] | reinterpret_cast<const Bits<T>&>(placed) : reinterpret_cast<const Bits<T>&>(placed);
    }
  }
}

// 1, -1/2!, 1/4!, ... of the cosine, 1, -1/3!, 1/5!, ... of the sine, 2, 2/3, 2/5, ... of log((1 + s) / (1 - s))
template <class T>
struct Series {
  static constexpr bool kSingle = sizeof(T) == 4;
  static constexpr int kTurn = kSingle ? 6 : 9, kLog = kSingle ? 5 : 10;
  T cosine[kTurn], sine[kTurn], log[kLog];
  constexpr Series() : cosine(), sine(), log() {
    double factor = 1;
    for (int i = 0; i < kTurn; factor /= -(2.0 * i + 1) * (2.0 * i + 2), ++i)
      cosine[i] = T(factor), sine[i] = T(factor / (2 * i + 1));
    for (int i = 0; i < kLog; ++i) log[i] = T(2.0 / (2 * i + 1));
  }
};
template <class T>
constexpr Series<T> kSeries{};
template <class T, int N>
inline Vec<T> polynomial(const T (&factors)[N], Vec<T> x) {
  Vec<T> sum = all(factors[N - 1]);
#pragma GCC unroll 10
  for (int i = N - 2; i >= 0; --i) sum = sum * x + factors[i];
  return sum;
}

// A signed or unsigned word as a number, rounded once; words of double lie in the lower halves.
inline Vec<float> number(Int<float> word) { return __builtin_convertvector(word, Vec<float>); }
inline Vec<float> number(Bits<float> word) {
  return number(Int<float>(word >> 16)) * 65536.0f + number(Int<float>(word & 0xFFFF));
}
inline Vec<double> number(Int<double> word) {
  const Int<double> shifted = word + 0x4338000000000000;  // the bits of 1.5 2^52: no instruction of AVX2 converts
  return reinterpret_cast<const Vec<double>&>(shifted) - 0x1.8p52;
}
inline Vec<double> number(Bits<double> word) { return number(Int<double>(word)); }

// sqrt(-2 log((word + 1/2) / 2^32)), relative error <= 3 eps: with u = 2^e m, sqrt(1/2) <= m < sqrt(2), and s = (m - 1)
// / (m + 1), log m is a series in s. Close to u = 1, m - 1 comes from the words that are left.
template <class T>
inline Vec<T> radius(Bits<T> word) {
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  using Word = std::remove_reference_t<decltype(std::declval<Bits<T>&>()[0])>;
  constexpr Word root = Word(sizeof(T) == 4 ? 0x3F3504F3 : 0x3FE6A09E667F3BCD);  // bits of sqrt(1/2)
  constexpr Word step = Word(1) << mantissa;
  const Vec<T> u = number(word) + T(0.5);
  const Bits<T> bits = reinterpret_cast<const Bits<T>&>(u) - (root - step);
  const Bits<T> fraction = (bits & (step - 1)) + root;
  const Int<T> exponent = Int<T>(bits >> mantissa) - 33;
  Vec<T> above = reinterpret_cast<const Vec<T>&>(fraction) - T(1);
  above = exponent == 0 ? (number(word ^ Word(kWord)) + T(0.5)) * T(-0x1p-32) : above;
  const Vec<T> s = above / (above + T(2));
  return square_root(T(-2) * (number(exponent) * T(0.6931471805599453) + s * polynomial(kSeries<T>.log, s * s)));
}

// pair[0], pair[1] <- two independent normals, radius times cosine and sine of 2 pi second / 2^32: relative
// error <= 6 eps.
template <class T>
inline void normals(Bits<T> first, Bits<T> second, Vec<T>* pair) {
  const Bits<T> quarter = (second + 0x20000000) >> 30;  // the nearest axis; a word of float wraps around with the angle
  const Vec<T> angle = number(Int<T>(second - (quarter << 30))) * T(0x1p-31 * 3.141592653589793);
  const Vec<T> square = angle * angle, length = radius<T>(first);
  const Vec<T> cosine = length * polynomial(kSeries<T>.cosine, square);
  const Vec<T> sine = length * (angle * polynomial(kSeries<T>.sine, square));
  const Int<T> turned = (quarter & 1) != 0;
  const Vec<T> across = turned ? -sine : cosine, up = turned ? cosine : sine;
  const Int<T> opposite = (quarter & 2) != 0;
  pair[0] = opposite ? -across : across, pair[1] = opposite ? -up : up;
}

}  // namespace flowfast::FLOWFAST_ISA
