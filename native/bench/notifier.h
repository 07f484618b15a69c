/* What telling subscribers costs (notifier/notifier.h), beside what any way of doing it would.
 *
 * Each function does one thing `times` times in the calling thread, on this process's address space, and
 * gives the nanoseconds of all of it. 0 or -errno. */
#ifndef UMM_BENCH_NOTIFIER_H
#define UMM_BENCH_NOTIFIER_H

#include <stdint.h>

enum umm_notify_floor_kind {
	UMM_NOTIFY_FLOOR_ATOMIC, /* a counter of one's own, atomically up and down: who changes memory is seen
	                          */
	UMM_NOTIFY_FLOOR_CALL,   /* two calls through a pointer: start and end of a list with one callback */
};
int umm_bench_notify_floor(int kind, uint64_t times, uint64_t *elapsed_ns);

/* umm_notify_start and umm_notify_end, with so many subscribers to everything: direct ones, or (sleeping)
 * ones that the start waits for. */
int umm_bench_notify_pair(uint32_t subscribers, int sleeping, uint64_t times, uint64_t *elapsed_ns);
/* The same beside `intervals` subscriptions, of a page each with a page between them: each range touches one,
 * in random order. */
int umm_bench_notify_intervals(uint32_t intervals, uint64_t times, uint64_t *elapsed_ns);
/* umm_notify_enter and umm_notify_leave with nobody subscribed: once for each batch of the evictor. */
int umm_bench_notify_batch(uint64_t times, uint64_t *elapsed_ns);
/* Subscribes `times` intervals, then unsubscribes them, while another thread (loaded) invalidates all the
 * time. */
int umm_bench_notify_register(uint64_t times, int loaded, uint64_t *subscribe_ns, uint64_t *unsubscribe_ns);

struct umm_bench_watcher;
/* A direct subscriber to [start, end) as long as it lives, that only counts. */
int umm_bench_watcher_create(uint64_t start, uint64_t end, struct umm_bench_watcher **ret);
/* Pairs that it was told of. */
uint64_t umm_bench_watcher_destroy(struct umm_bench_watcher *watcher);

#endif
