// Threads for kernels: the caller takes part, and helpers that spin briefly before they sleep.
#pragma once

// Runs fn(context, task) for every task below `tasks`, which may run in any order and on any thread;
// returns when all are done. From several threads at once, or in a forked child, the caller works alone.
void parallel(int tasks, void (*fn)(void*, int), void* context);

// Threads that work on one job, the caller included; at least 1.
void set_threads(int count);
int threads();
