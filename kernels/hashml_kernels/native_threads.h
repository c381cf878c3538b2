// Work on the threads of XLA's own pool, for the native kernels that `hashml_kernels.native` compiles.

#ifndef HASHML_NATIVE_THREADS_H_
#define HASHML_NATIVE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace hashml {

// Units of work that the calling thread and those of the pool take one after another. The caller works too and waits
// only for units that a thread has begun, so a pool whose threads are all waiting cannot block itself.
struct Shared {
  std::atomic<int64_t> next{0};
  int64_t count = 0, done = 0;
  std::mutex mutex;
  std::condition_variable finished;
};

template <typename Work>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  auto shared = std::make_shared<Shared>();
  shared->count = count;
  const auto take = [shared, &work] {  // `work` is alive as long as a unit is left
    int64_t own = 0;
    for (int64_t unit; (unit = shared->next.fetch_add(1)) < shared->count; ++own) work(unit);
    if (!own) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    if ((shared->done += own) == shared->count) shared->finished.notify_all();
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == shared->count; });
}

}  // namespace hashml

#endif  // HASHML_NATIVE_THREADS_H_
