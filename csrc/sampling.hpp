// Draws of a mixture, one per row, that depend on a seed and a row alone. Which counter serves which number:
// flowfast/philox.py.
#pragma once
#include "lanes.hpp"
#include "normals.hpp"

namespace flowfast::FLOWFAST_ISA {

// chosen[l] <- the first component whose cumulative weight exceeds the uniform number (52 bits) of row first_row + l
template <class T>
void components(const SampleJob<T>& job, int64_t first_row, int64_t count, int64_t* chosen) {
  for (int64_t start = 0; start < count; start += W<double>) {
    Wide row, words[4];
    for (int l = 0; l < W<double>; ++l) row[l] = uint64_t(first_row + start + l);
    philox<double>(&row, 0, 1, job.seed, words);
    for (int64_t l = 0; l < W<double> && start + l < count; ++l) {
      const double u = double(words[0][l] << 20 | words[1][l] >> 12) * 0x1p-52;
      int64_t below = 0;
      for (int64_t left = job.k; left > 1; left -= left / 2)  // cumulative[i] <= u for every i < below
        below += job.cumulative[below + left / 2 - 1] <= u ? left / 2 : 0;
      chosen[start + l] = below;
    }
  }
}

template <class T>
void sample(const SampleJob<T>& job, Work& work, Arena& arena) {
  T* lanes = take<T>(arena, kChunk * B<T>);
  int64_t chosen[B<T>];
  T* rows[B<T>];
  for (int64_t begin, end; next_rows(work, begin, end);)
    for (; begin < end; begin += B<T>) {
      const int64_t count = end - begin < B<T> ? end - begin : B<T>;
      components(job, job.first_row + begin, count, chosen);
      for (int64_t from = 0; from < job.d; from += kChunk) {
        const int64_t width = job.d - from < kChunk ? job.d - from : kChunk;
        for (int p = 0; p < P; ++p) {
          Wide row[W<T> / W<double>];
          for (int l = 0; l < W<T>; ++l)
            row[l % (W<T> / W<double>)][l / (W<T> / W<double>)] = uint64_t(job.first_row + begin + p * W<T> + l);
          for (int64_t j = 0; j < width; j += 4) {
            Bits<T> words[4];
            Vec<T> four[4];
            philox<T>(row, uint32_t((from + j) / 4), 0, job.seed, words);
            normals<T>(words[0], words[1], four), normals<T>(words[2], words[3], four + 2);
            for (int i = 0; i < 4; ++i) at(lanes + (j + i) * B<T> + p * W<T>) = four[i];
          }
        }
        for (int64_t l = 0; l < count; ++l) rows[l] = job.out + (begin + l) * job.d + from;
        lanes_to_rows(lanes, width, count, rows);
        for (int64_t l = 0; l < count; ++l) {
          const T* mean = job.means + chosen[l] * job.d + from;
          const T alpha = T(job.alpha[(begin + l) * job.alpha_step]), std = T(job.std[(begin + l) * job.std_step]);
          for (int64_t j = 0; j < width; j += W<T>)
            store(alpha * load(mean + j, width - j) + std * load(rows[l] + j, width - j), rows[l] + j, width - j);
        }
      }
    }
}

}  // namespace flowfast::FLOWFAST_ISA
