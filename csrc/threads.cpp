#include "threads.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace longllava {

void parallel_for(int64_t n_tasks, int n_threads, void (*task)(void* context, int64_t i), void* context) {
  if (n_threads > n_tasks) n_threads = static_cast<int>(n_tasks);
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n_tasks; ++i) task(context, i);
    return;
  }
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) task(context, i);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(n_threads - 1);
  try {
    for (int i = 1; i < n_threads; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // the system refused a thread: those that started, and this one, do all the tasks
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace longllava
