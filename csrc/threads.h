// Runs task(context, i) for i in [0, n_tasks) on up to n_threads threads and returns when all are done.
//
// Tasks are handed out one by one, so results must not depend on which thread runs which task. Threads live for
// one call: starting one takes some 10 us, and nothing is left behind that a fork() could break. Callers ask
// for one thread when the whole work is shorter than about 100 us.
#pragma once

#include <stdint.h>

namespace longllava {

void parallel_for(int64_t n_tasks, int n_threads, void (*task)(void* context, int64_t i), void* context);

}  // namespace longllava
