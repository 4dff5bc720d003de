#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace qf {
namespace {

thread_local bool inside = false;
thread_local const Crew* borrowed = nullptr;

struct Job {
  const std::function<void(int64_t)>& body;
  const int64_t n;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void drain() {
    inside = true;
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
    } catch (const std::bad_alloc&) {
      failed = true, next = n;
    }
    inside = false;
  }
};

class Pool {
 public:
  void run(int helpers, Job& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (int(workers_.size()) < helpers) workers_.emplace_back([this] { work(); });
    job_ = &job, open_ = helpers, round_++;
    wake_.notify_all();
    lock.unlock();
    job.drain();
    lock.lock();
    open_ = 0;  // a helper that has not come by now is not needed any more
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return open_ > 0 && round_ != seen; });
      seen = round_, open_--, busy_++;
      lock.unlock();
      job_->drain();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int open_ = 0, busy_ = 0;  // places left for helpers; helpers at work
  uint64_t round_ = 0;
};

// Both live for ever: sleeping threads must not keep a process from exiting. A child of fork() has the memory of the
// pool but not its threads, so it starts afresh.
Pool* pool = nullptr;
std::mutex* turn = new std::mutex;  // one user at a time; others meanwhile do with their own thread
const int forks = pthread_atfork(nullptr, nullptr, [] { pool = nullptr, turn = new std::mutex; });

}  // namespace

bool parallel(int threads, int64_t n, const std::function<void(int64_t)>& body) {
  const int cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t wanted = std::min<int64_t>(threads > 0 ? std::min(threads, 4 * cores) : cores, n);
  Job job{body, n};
  std::unique_lock<std::mutex> lock(*turn, std::defer_lock);
  if (wanted > 1 && !inside && borrowed) {
    (*borrowed)([&] { job.drain(); });
  } else if (wanted > 1 && !inside && lock.try_lock()) {
    if (!pool) pool = new Pool;
    pool->run(int(wanted) - 1, job);
  } else {
    const bool nested = inside;
    job.drain();
    inside = nested;
  }
  return !job.failed;
}

Borrowed::Borrowed(const Crew& crew) { borrowed = &crew; }
Borrowed::~Borrowed() { borrowed = nullptr; }

}  // namespace qf
