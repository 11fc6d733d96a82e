#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace longllava {
namespace {

// Starts a team of OpenMP's threads: fn(data) by each. Null where the process has no OpenMP.
typedef void (*Team)(void (*fn)(void* data), void* data, unsigned n_threads, unsigned flags);

// torch's threads stay awake for a while after each of its operations. Threads of our own would share the cores with
// them; as their next task, a kernel costs no start either. GOMP_parallel is what GCC calls for a parallel region;
// LLVM's and Intel's OpenMP have it, too. Whatever the process has loaded is used, nothing is linked.
Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Loop {
  int64_t n_tasks;
  void (*task)(void* context, int64_t i);
  void* context;
  std::atomic<int64_t> next{0};
};

void take_tasks(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.n_tasks;) loop.task(loop.context, i);
}

}  // namespace

void parallel_for(int64_t n_tasks, int n_threads, void (*task)(void* context, int64_t i), void* context) {
  if (n_threads > n_tasks) n_threads = static_cast<int>(n_tasks);
  Loop loop{n_tasks, task, context};
  if (n_threads <= 1) return take_tasks(&loop);
  if (team() != nullptr) return team()(take_tasks, &loop, static_cast<unsigned>(n_threads), 0);
  std::vector<std::thread> helpers;
  helpers.reserve(n_threads - 1);
  try {
    for (int i = 1; i < n_threads; ++i) helpers.emplace_back(take_tasks, &loop);
  } catch (const std::system_error&) {
    // the system refused a thread: those that started, and this one, do all the tasks
  }
  take_tasks(&loop);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace longllava
