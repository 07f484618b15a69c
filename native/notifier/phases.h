/* Who is inside, without a lock: two sets of counters, as SRCU has them (kernel/rcu/srcutree.c).
 *
 * A thread counts itself into the phase that is current, and out of the same counter. To wait for all that
 * were inside at some moment, the idle phase is waited for, the phases change places, and the other one is
 * waited for: newcomers cannot keep it from reaching zero. A thread that read the phase before it changed and
 * counts itself in afterwards has missed nothing: what it looks at next, it sees as it was published before.
 */
#ifndef UMM_NOTIFIER_PHASES_H
#define UMM_NOTIFIER_PHASES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { PHASE_SLOTS = 16, PHASE_LINE = 64 };

struct phase_counter {
	_Atomic uint64_t n;
	char pad[PHASE_LINE - sizeof(uint64_t)];
};

struct phases {
	struct phase_counter counters[2][PHASE_SLOTS];
	_Atomic unsigned current;
	pthread_mutex_t lock; /* of those who wait */
};

static inline _Atomic uint64_t *phases_enter(struct phases *phases, unsigned slot)
{
	unsigned phase = atomic_load_explicit(&phases->current, memory_order_relaxed) & 1;
	_Atomic uint64_t *counter = &phases->counters[phase][slot % PHASE_SLOTS].n;
	/* Sequentially consistent: before every look at what is published. */
	atomic_fetch_add(counter, 1);
	return counter;
}

static inline void phases_leave(_Atomic uint64_t *counter)
{
	atomic_fetch_sub_explicit(counter, 1, memory_order_release);
}

void phases_init(struct phases *phases);
/* Waits until all who were inside when it was called have left. 0 or -ETIMEDOUT. UINT64_MAX: no limit. */
int phases_drain(struct phases *phases, uint64_t timeout_ns);

#endif
