// Runs task(context, i) for i in [0, n_tasks) on up to n_threads threads and returns when all are done.
//
// Tasks are handed out one by one, so results must not depend on which thread runs which task. The threads are those
// of the OpenMP that torch has loaded, if there is one, else threads that live for one call: starting one takes some
// 30 us. Callers ask for one thread when the whole work is shorter than about 100 us. As with torch's own operations, a
// process that was forked from one with threads asks for one.
#pragma once

#include <stdint.h>

namespace longllava {

void parallel_for(int64_t n_tasks, int n_threads, void (*task)(void* context, int64_t i), void* context);

}  // namespace longllava
