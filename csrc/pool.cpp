#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

namespace flowfast {

bool next_rows(Work& work, int64_t& begin, int64_t& end) {
  begin = work.next_.fetch_add(work.grain_, std::memory_order_relaxed);
  end = std::min(work.rows_, begin + work.grain_);
  return begin < work.rows_;
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page, end = (uintptr_t(memory) + bytes) / page * page;
  if (end > begin + page) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* Arena::take(size_t bytes) {
  blocks_.emplace_back(std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64)), std::free);
  if (!blocks_.back()) throw std::bad_alloc();
  prefer_huge_pages(blocks_.back().get(), bytes);
  return blocks_.back().get();
}

void* take_bytes(Arena& arena, size_t bytes) { return arena.take(bytes); }

int quota_cpus(const std::string& root, std::string group) {
  double cpus = kManyCpus;
  for (;; group.resize(group.rfind('/'))) {  // a group's parents limit it too
    double quota = 0, period = 0;            // and stay so where there is no such file, or it says "max"
    std::ifstream(root + group + "/cpu.max") >> quota >> period;
    std::ifstream(root + group + "/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream(root + group + "/cpu/cpu.cfs_period_us") >> period;
    if (quota > 0 && period > 0) cpus = std::min(cpus, std::ceil(quota / period));
    if (group.empty()) return int(cpus);
  }
}

namespace {

// CPUs this thread may use now. The quota is read once: it is a property of the container.
int allowed_cpus() {
  static const int quota = [] {
    std::string line, group;
    std::ifstream groups("/proc/self/cgroup");
    while (std::getline(groups, line))
      if (line.rfind("0::/", 0) == 0) group = line.substr(3);
    return quota_cpus("/sys/fs/cgroup", group);
  }();
#ifdef CPU_COUNT
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::min(quota, CPU_COUNT(&set));
#endif
  return std::min(quota, int(std::max(1u, std::thread::hardware_concurrency())));
}

// The threads of a call take its workers by turns. Waking a thread costs tens of microseconds: what none has begun when
// the caller is done with its own, it does itself.
class Pool {
 public:
  ~Pool() {
    std::unique_lock<std::mutex> lock(mutex_);
    stop_ = true;
    lock.unlock();
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // False, and nothing done, while another call runs.
  bool try_run(int threads, int workers, const std::function<void(int)>& body) {
    if (busy_.exchange(true)) return false;
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      while (int(threads_.size()) < threads - 1)
        threads_.emplace_back([this, thread = int(threads_.size()) + 1] { loop(thread); });
    } catch (const std::exception&) {}  // the system gives no more: the others do the work
    body_ = &body, left_ = workers, wanted_ = threads;
    processor_ = sched_getcpu();
    ++round_;
    lock.unlock();
    start_.notify_all();  // without the lock, which the woken would only wait for
    lock.lock();
    work(lock);
    lock.unlock();
    linger([this] { return running_ == 0; });
    lock.lock();
    done_.wait(lock, [this] { return running_ == 0; });
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_ = false;
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  void work(std::unique_lock<std::mutex>& lock) {
    while (left_ > 0) {
      const int worker = --left_;
      ++running_;
      lock.unlock();
      try {
        (*body_)(worker);
        lock.lock();
      } catch (...) {
        lock.lock();
        if (!error_) error_ = std::current_exception();
      }
      --running_;
    }
  }

  // Gives the processor to others until ready() or for about as long as falling asleep and waking up would take.
  template <class Ready>
  static void linger(const Ready& ready) {
    const auto enough = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (!ready() && std::chrono::steady_clock::now() < enough) std::this_thread::yield();
  }

  void loop(int thread) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (unsigned seen = round_ - 1; !stop_; seen = round_) {
      lock.unlock();
      // calls often follow each other; a thread on the caller's own processor sleeps, to be woken on a free one
      linger([&] { return round_ != seen || sched_getcpu() == processor_; });
      lock.lock();
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (thread < wanted_) work(lock);
      if (running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  std::atomic<bool> busy_{false};
  std::atomic<int> running_{0};     // workers begun and not done
  std::atomic<int> processor_{-1};  // of the caller
  std::atomic<unsigned> round_{0};  // calls begun
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr error_;
  int left_ = 0, wanted_ = 0;  // workers not begun, threads that may take one
  bool stop_ = false;
};

// A forked child owns none of the parent's threads: a new pool takes the memory of the parent's, which is not
// destroyed.
union Owner {
  Pool pool;
  Owner();
  ~Owner() { pool.~Pool(); }
} owner;

Owner::Owner() {
  new (&pool) Pool;
  pthread_atfork(nullptr, nullptr, [] { new (&owner.pool) Pool; });
}

}  // namespace

void run_workers(int workers, const std::function<void(int)>& body) {
  const int threads = workers > 1 ? std::min(workers, allowed_cpus()) : 1;
  if (threads > 1 && owner.pool.try_run(threads, workers, body)) return;
  for (int worker = 0; worker < std::max(workers, 1); ++worker) body(worker);
}

}  // namespace flowfast
