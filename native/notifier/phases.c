#include "notifier/phases.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include "common/clock.h"

enum { SPINS = 64, NAP_NS = 20000 };

void phases_init(struct phases *phases)
{
	memset(phases, 0, sizeof(*phases));
	pthread_mutex_init(&phases->lock, NULL);
}

static void pause_briefly(unsigned *spins)
{
	if (++*spins < SPINS)
		sched_yield();
	else
		nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
}

/* Each counter was seen at zero once. */
static int wait_for(struct phases *phases, unsigned phase, uint64_t began, uint64_t timeout_ns)
{
	unsigned spins = 0;
	for (unsigned slot = 0; slot < PHASE_SLOTS; slot++)
		while (atomic_load(&phases->counters[phase][slot].n)) {
			if (timeout_ns != UINT64_MAX && umm_now_ns() - began > timeout_ns)
				return -ETIMEDOUT;
			pause_briefly(&spins);
		}
	return 0;
}

int phases_drain(struct phases *phases, uint64_t timeout_ns)
{
	uint64_t began = umm_now_ns();
	unsigned spins = 0;
	while (pthread_mutex_trylock(&phases->lock)) {
		if (timeout_ns != UINT64_MAX && umm_now_ns() - began > timeout_ns)
			return -ETIMEDOUT;
		pause_briefly(&spins);
	}
	unsigned current = atomic_load(&phases->current) & 1;
	int err = wait_for(phases, !current, began, timeout_ns);
	if (!err) {
		atomic_store(&phases->current, !current);
		err = wait_for(phases, current, began, timeout_ns);
	}
	pthread_mutex_unlock(&phases->lock);
	return err;
}
