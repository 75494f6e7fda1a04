// Threads of our own: a static pool that survives fork, gives every call the thread count it asks for, passes
// exceptions on and joins at exit. Results never depend on which worker does which rows.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace flowfast {

// Rows 0 .. rows - 1, handed out in runs of `grain`.
class Work {
 public:
  Work(int64_t rows, int64_t grain) : rows_(rows), grain_(grain) {}

 private:
  friend bool next_rows(Work&, int64_t&, int64_t&);
  std::atomic<int64_t> next_{0};
  const int64_t rows_, grain_;
};

class Arena {
 public:
  void* take(size_t bytes);

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

// Fresh memory is taken in pages of 2 MiB where they fit in, with a hundredth of the page faults.
void prefer_huge_pages(void* memory, size_t bytes);

// Runs body(worker) for worker = 0 .. workers - 1, on as many threads as that but no more than the CPUs the process may
// use (affinity and cgroup quota); the caller is one of them, and does what the others have not begun when it is done
// with its own. Nested or concurrent calls run all on the caller. Rethrows the first exception a worker threw.
void run_workers(int workers, const std::function<void(int)>& body);

// CPUs that the quota of a cgroup (v2, or v1 at the root) leaves, rounded up; kManyCpus without a quota.
constexpr int kManyCpus = 1 << 20;
int quota_cpus(const std::string& root, std::string group);

}  // namespace flowfast
