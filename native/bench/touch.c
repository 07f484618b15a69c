#include "bench/touch.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "common/clock.h"

enum { MAX_THREADS = 1024 };

enum gate_state { GATE_SHUT, GATE_OPEN, GATE_ABANDONED };

/* Not a pthread_barrier: a thread that could not be created must not leave the others waiting. */
struct gate {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum gate_state state;
};

struct toucher {
	pthread_t thread;
	const struct umm_touch_job *job;
	struct gate *gate;
	uint64_t first, last;
	uint64_t wrong;
};

static void gate_set(struct gate *gate, enum gate_state state)
{
	pthread_mutex_lock(&gate->lock);
	gate->state = state;
	pthread_cond_broadcast(&gate->changed);
	pthread_mutex_unlock(&gate->lock);
}

static enum gate_state gate_wait(struct gate *gate)
{
	pthread_mutex_lock(&gate->lock);
	while (gate->state == GATE_SHUT)
		pthread_cond_wait(&gate->changed, &gate->lock);
	enum gate_state state = gate->state;
	pthread_mutex_unlock(&gate->lock);
	return state;
}

static void *touch_share(void *arg)
{
	struct toucher *self = arg;
	const struct umm_touch_job *job = self->job;
	uint64_t wrong = 0;

	if (gate_wait(self->gate) == GATE_ABANDONED)
		return NULL;
	for (uint64_t i = self->first; i < self->last; i++) {
		const volatile uint64_t *word = (const volatile uint64_t *)(uintptr_t)job->addresses[i];
		uint64_t before = umm_now_ns();
		uint64_t seen = *word;
		uint64_t ns = umm_now_ns() - before;
		job->latency_ns[i] = ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
		wrong += job->expected && seen != job->expected[i];
	}
	self->wrong = wrong;
	return NULL;
}

int umm_bench_touch(struct umm_touch_job *job)
{
	if (job->threads == 0 || job->threads > MAX_THREADS || !job->addresses || !job->latency_ns)
		return -EINVAL;
	/* Written before the clock starts, so that only the touched pages fault inside the measurement. */
	for (uint64_t i = 0; i < job->count; i++)
		job->latency_ns[i] = 0;

	struct toucher *touchers = calloc(job->threads, sizeof(*touchers));
	if (!touchers)
		return -ENOMEM;
	struct gate gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, GATE_SHUT};
	unsigned started = 0;
	int err = 0;
	for (; started < job->threads; started++) {
		struct toucher *t = &touchers[started];
		t->job = job;
		t->gate = &gate;
		t->first = job->count * started / job->threads;
		t->last = job->count * (started + 1) / job->threads;
		err = -pthread_create(&t->thread, NULL, touch_share, t);
		if (err)
			break;
	}
	uint64_t begin = umm_now_ns();
	gate_set(&gate, err ? GATE_ABANDONED : GATE_OPEN);
	job->wrong = 0;
	for (unsigned i = 0; i < started; i++) {
		pthread_join(touchers[i].thread, NULL);
		job->wrong += touchers[i].wrong;
	}
	job->elapsed_ns = umm_now_ns() - begin;
	free(touchers);
	return err;
}
