#include "pool.hpp"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <thread>

namespace flowfast {

bool next_rows(Work& work, int64_t& begin, int64_t& end) {
  begin = work.next_.fetch_add(work.grain_, std::memory_order_relaxed);
  end = std::min(work.rows_, begin + work.grain_);
  return begin < work.rows_;
}

void* Arena::take(size_t bytes) {
  void* block = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  if (!block) throw std::bad_alloc();
  blocks_.emplace_back(block);
  return block;
}

void Arena::Release::operator()(void* block) const { std::free(block); }

void* take_bytes(Arena& arena, size_t bytes) { return arena.take(bytes); }

int quota_cpus(const std::string& root, std::string group) {
  double cpus = kManyCpus;
  while (true) {  // a group's parents limit it too
    const std::string folder = root + (group == "/" ? "" : group);
    double quota = -1, period = 0;
    if (std::ifstream file(folder + "/cpu.max"); file)
      file >> quota >> period;  // "max" leaves 0
    else
      std::ifstream(folder + "/cpu/cpu.cfs_quota_us") >> quota,
          std::ifstream(folder + "/cpu/cpu.cfs_period_us") >> period;
    if (quota > 0 && period > 0) cpus = std::min(cpus, std::ceil(quota / period));
    if (group.empty() || group == "/") return int(cpus);
    group.resize(group.rfind('/'));
  }
}

namespace {

// CPUs this thread may use now. The quota is read once: it is a property of the container.
int allowed_cpus() {
  static const int quota = [] {
    std::string line;
    std::ifstream groups("/proc/self/cgroup");
    while (std::getline(groups, line) && line.rfind("0::", 0) != 0) {}
    return quota_cpus("/sys/fs/cgroup", line.rfind("0::/", 0) == 0 ? line.substr(3) : "");
  }();
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::min(quota, CPU_COUNT(&set));
#endif
  return std::min(quota, int(std::max(1u, std::thread::hardware_concurrency())));
}

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  bool try_run(int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < threads - 1)
        threads_.emplace_back([this, worker = int(threads_.size()) + 1, seen = round_] { loop(worker, seen); });
      body_ = &body;
      wanted_ = threads;
      pending_ = threads - 1;
      error_ = nullptr;
      ++round_;
    }
    start_.notify_all();
    guarded(body, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  void guarded(const std::function<void(int)>& body, int worker) {
    try {
      body(worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void loop(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      if (worker >= wanted_) continue;
      const std::function<void(int)>& body = *body_;
      lock.unlock();
      guarded(body, worker);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* body_ = nullptr;
  std::exception_ptr error_;
  uint64_t round_ = 0;
  int wanted_ = 0, pending_ = 0;
  bool stop_ = false;
};

// A forked child owns none of the parent's threads: it forgets the parent's pool, which is deliberately not destroyed
// there.
struct Owner {
  std::atomic<Pool*> pool{nullptr};
  Owner();
  ~Owner() { delete pool.load(); }
  Pool& get() {
    Pool* current = pool.load();
    if (current) return *current;
    auto fresh = std::make_unique<Pool>();
    if (pool.compare_exchange_strong(current, fresh.get())) return *fresh.release();
    return *current;
  }
} owner;

Owner::Owner() {
  pthread_atfork(nullptr, nullptr, [] { owner.pool.store(nullptr); });
}

}  // namespace

void run_workers(int workers, const std::function<void(int)>& body) {
  const int threads = workers > 1 ? std::min(workers, allowed_cpus()) : 1;
  const auto share = [&](int thread) {
    for (int worker = thread; worker < std::max(workers, 1); worker += threads) body(worker);
  };
  if (threads > 1 && owner.get().try_run(threads, share)) return;
  for (int thread = 0; thread < threads; ++thread) share(thread);
}

}  // namespace flowfast
