/* The touch driver: threads that read one word at each of a list of addresses and time each read.
 *
 * Every contender of a benchmark is driven by this same loop, on its own addresses. */
#ifndef UMM_BENCH_TOUCH_H
#define UMM_BENCH_TOUCH_H

#include <stdint.h>

struct umm_touch_job {
	const uint64_t *addresses; /* in the order of the touches; each aligned to 8 bytes */
	const uint64_t *expected;  /* the word that each address must hold, or NULL */
	uint64_t count;
	uint32_t threads;     /* each takes a contiguous share of the list; 1 .. 1024 */
	uint32_t *latency_ns; /* count entries: out, the duration of each touch (saturated at 2^32 - 1) */
	uint64_t elapsed_ns;  /* out: from the release of all threads to the end of the last */
	uint64_t wrong;       /* out: words that were not the expected ones */
};

/* The threads are not pinned: users' threads are not, and where a thread runs is part of what a
 * handler's placement is measured against. 0 or -errno. */
int umm_bench_touch(struct umm_touch_job *job);

#endif
