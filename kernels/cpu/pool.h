// One persistent pool of threads for the whole library; the caller of parallel() is one of the workers.
#pragma once
#include <cstdint>
#include <functional>

namespace qf {

// Calls body(i) for every i in [0, n) on at most `threads` threads (0: one per core) and returns when all are done;
// false if one of them ran out of memory. Items are handed out one by one, so a result must not depend on which thread
// computes it. Calls from inside a body run on its own thread.
bool parallel(int threads, int64_t n, const std::function<void(int64_t)>& body);

// Another's threads instead of the pool's, for the calls of parallel() from this thread while a Borrowed lives. A
// crew calls its argument, which does not throw, once on each of any number of threads.
using Crew = std::function<void(const std::function<void()>&)>;
class Borrowed {
 public:
  explicit Borrowed(const Crew& crew);
  ~Borrowed();
  Borrowed(const Borrowed&) = delete;
};

}  // namespace qf
