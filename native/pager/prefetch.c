/* Recognising runs of faults, and the thread that reads ahead of them.
 *
 * Reads of present pages leave no trace, so each window leaves one unit out, in its middle: the fault
 * there says that the run goes on, while the rest of the window is still being used, and asks for the
 * next one, twice as large. */
#include "pager/internal.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "common/clock.h"
#include "common/lock.h"

static const uint64_t window_max_bytes = 2 << 20;
static const uint32_t window_first = 8, run_needed = 2;
static const uint64_t prefetch_slice = 64 << 10;
static const int64_t stride_max = 4096;       /* no page size: units */
static const uint64_t worth_prefetching = 16; /* no page size: units */

bool prefetch_post(struct umm_region *region, uint64_t first, uint64_t count, int64_t stride)
{
	struct worker *worker = &region->pager->worker;
	/* Closing waits for claims once. */
	if (region->closing)
		return false;
	/* Its holders keep it for some instructions only. */
	pthread_mutex_lock(&worker->lock);
	bool posted = false;
	if (worker->tail - worker->head < MAX_PREFETCHES && !worker->stop) {
		worker->requests[worker->tail++ % MAX_PREFETCHES] =
		        (struct prefetch_request){region, first, count, stride};
		claim_begin(region);
		posted = true;
		if (stride) {
			region->counters.prefetch_issued += count;
			region->uf->counters.prefetch_issued += count;
		}
		pthread_cond_signal(&worker->wake);
	}
	pthread_mutex_unlock(&worker->lock);
	return posted;
}

static void count_hits(struct umm_region *region, struct stream *stream)
{
	/* The run came as far as the trip wire: what was prefetched before it has been passed. */
	uint64_t unit = stream->last;
	for (uint32_t i = 0; i < 2 * stream->window && unit != stream->trip; i++) {
		unit += (uint64_t)stream->stride;
		if (unit >= region->n_units)
			break;
		if (unit_flag(region, unit, UNIT_PREFETCHED)) {
			unit_unmark(region, unit, UNIT_PREFETCHED);
			region->counters.prefetch_hits++;
			region->uf->counters.prefetch_hits++;
		}
	}
}

static void ask(struct umm_region *region, struct stream *stream, uint64_t unit)
{
	uint64_t most = window_max_bytes / region->unit;
	uint64_t budget = atomic_load_explicit(&region->pager->budget, memory_order_relaxed);
	/* A half is posted at a time, and fits between the evictor's target and the limit. */
	if (budget && most > budget / 16 / region->unit)
		most = budget / 16 / region->unit;
	if (stream->window > most)
		stream->window = (uint32_t)most;
	if (stream->window < 2)
		return;
	uint64_t step = (uint64_t)stream->stride;
	uint64_t half = stream->window / 2;
	if (stream->next == unit)
		stream->next = unit + step;
	uint64_t from = stream->next;
	/* Two posts around the unit that is left out. */
	stream->trip = from + half * step;
	stream->next = from + stream->window * step;
	uint64_t limit = region->n_units;
	uint64_t before = 0, after = 0;
	while (before < half && from + before * step < limit)
		before++;
	while (after < stream->window - half - 1 && stream->trip + (after + 1) * step < limit)
		after++;
	if (before)
		prefetch_post(region, from, before, stream->stride);
	if (after && stream->trip < limit)
		prefetch_post(region, stream->trip + step, after, stream->stride);
}

static struct stream *oldest(struct umm_region *region)
{
	struct stream *old = &region->streams[0];
	for (int i = 1; i < MAX_STREAMS; i++)
		if (region->streams[i].used < old->used)
			old = &region->streams[i];
	return old;
}

void prefetch_on_fault(struct umm_region *region, uint64_t unit)
{
	/* In a small region there is less to gain than looking at the streams costs. */
	if (region->n_units < worth_prefetching || region->advice == UMM_REGION_RANDOM)
		return;
	uint64_t clock = ++region->stream_clock;
	for (int i = 0; i < MAX_STREAMS; i++) {
		struct stream *stream = &region->streams[i];
		if (stream->used && stream->window && (unit == stream->trip || unit == stream->next)) {
			/* Later than the trip wire: the worker did not keep up, but the run goes on. */
			count_hits(region, stream);
			stream->last = unit;
			stream->used = clock;
			stream->window *= 2;
			if (unit == stream->next)
				stream->next = unit + (uint64_t)stream->stride;
			ask(region, stream, unit);
			return;
		}
	}
	for (int i = 0; i < MAX_STREAMS; i++) {
		struct stream *stream = &region->streams[i];
		int64_t delta = (int64_t)(unit - stream->last);
		if (!stream->used || delta == 0 || delta > stride_max || delta < -stride_max)
			continue;
		if (delta != stream->stride) {
			/* Near, but not in step: a new distance. A window that missed falls back. */
			if (stream->run > 1)
				continue;
			stream->stride = delta;
			stream->run = 1;
			stream->window = 0;
		} else {
			stream->run++;
		}
		stream->last = unit;
		stream->used = clock;
		if (stream->run >= run_needed) {
			stream->window = stream->window ? stream->window / 2 : window_first;
			if (stream->window < window_first)
				stream->window = window_first;
			stream->next = unit + (uint64_t)stream->stride;
			ask(region, stream, unit);
		}
		return;
	}
	struct stream *stream = oldest(region);
	*stream = (struct stream){.last = unit, .used = clock};
	if (region->advice == UMM_REGION_SEQUENTIAL) {
		stream->stride = 1;
		stream->run = run_needed;
		stream->window = window_first;
		stream->next = unit + 1;
		ask(region, stream, unit);
	}
}

static void serve_request(struct umm_pager *pager, const struct prefetch_request *request, uint8_t *buffer)
{
	struct umm_region *region = request->region;
	if (request->stride == 0) {
		poison_by_mapping(region, request->first);
	} else if (request->stride == 1) {
		bring_in(region, request->first, request->count, true, prefetch_slice, buffer);
	} else {
		uint64_t unit = request->first;
		for (uint64_t i = 0; i < request->count && unit < region->n_units; i++) {
			if (bring_in(region, unit, 1, true, prefetch_slice, buffer))
				break;
			unit += (uint64_t)request->stride;
		}
	}
	(void)pager;
}

static uint64_t expire_all(struct umm_pager *pager)
{
	uint64_t next = 0, now = umm_now_ns();
	for (uint32_t i = 0; i < pager->n_ufs; i++) {
		pthread_mutex_lock(&pager->ufs[i].lock);
		uint64_t one = requests_expire(&pager->ufs[i], now);
		pthread_mutex_unlock(&pager->ufs[i].lock);
		if (one && (!next || one < next))
			next = one;
	}
	return next;
}

static void *worker_main(void *argument)
{
	struct umm_pager *pager = argument;
	struct worker *worker = &pager->worker;
	prctl(PR_SET_NAME, "umm-prefetch");
	pthread_mutex_lock(&worker->lock);
	while (!worker->stop) {
		if (worker->head == worker->tail) {
			if (!worker->timeouts) {
				pthread_cond_wait(&worker->wake, &worker->lock);
				continue;
			}
			/* Asynchronous stores have deadlines of milliseconds: look every few of them. */
			struct timespec until;
			clock_gettime(CLOCK_MONOTONIC, &until);
			until.tv_nsec += 5000000;
			if (until.tv_nsec >= 1000000000) {
				until.tv_nsec -= 1000000000;
				until.tv_sec++;
			}
			pthread_cond_timedwait(&worker->wake, &worker->lock, &until);
			pthread_mutex_unlock(&worker->lock);
			expire_all(pager);
			pthread_mutex_lock(&worker->lock);
			continue;
		}
		struct prefetch_request request = worker->requests[worker->head++ % MAX_PREFETCHES];
		pthread_mutex_unlock(&worker->lock);
		/* Under pressure what was asked for would push out what is used. */
		uint64_t more = request.count * request.region->unit;
		if (request.stride == 0 || !atomic_load(&pager->budget) ||
		        atomic_load(&pager->resident) + more <= resident_limit(pager))
			serve_request(pager, &request, worker->buffer);
		pthread_mutex_lock(&request.region->uf->lock);
		claim_end(request.region);
		pthread_mutex_unlock(&request.region->uf->lock);
		pthread_mutex_lock(&worker->lock);
	}
	while (worker->head != worker->tail) {
		struct umm_region *region = worker->requests[worker->head++ % MAX_PREFETCHES].region;
		pthread_mutex_unlock(&worker->lock);
		pthread_mutex_lock(&region->uf->lock);
		claim_end(region);
		pthread_mutex_unlock(&region->uf->lock);
		pthread_mutex_lock(&worker->lock);
	}
	pthread_mutex_unlock(&worker->lock);
	return NULL;
}

int worker_start(struct umm_pager *pager)
{
	struct worker *worker = &pager->worker;
	pthread_mutex_init(&worker->lock, NULL);
	pthread_condattr_t attributes;
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&worker->wake, &attributes);
	pthread_condattr_destroy(&attributes);
	worker->stop = false;
	worker->head = worker->tail = 0;
	if (!worker->buffer)
		worker->buffer = map_anonymous(pager->buffer_bytes, pager->pmd);
	if (!worker->buffer)
		return -ENOMEM;
	int err = pthread_create(&worker->thread, NULL, worker_main, pager);
	pager->worker_runs = !err;
	return -err;
}

void worker_join(struct umm_pager *pager)
{
	struct worker *worker = &pager->worker;
	pthread_mutex_lock(&worker->lock);
	worker->stop = true;
	pthread_cond_signal(&worker->wake);
	pthread_mutex_unlock(&worker->lock);
	if (pager->worker_runs)
		pthread_join(worker->thread, NULL);
}

int umm_region_prefetch(struct umm_region *region, uint64_t offset, uint64_t len)
{
	if (region->unserved)
		return -ENODEV;
	if (offset > region->mapped || len > region->mapped - offset)
		return -EINVAL;
	if (!len)
		return 0;
	uint64_t first = offset / region->unit, last = (offset + len - 1) / region->unit;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&region->uf->lock);
	if (!region->closing)
		prefetch_post(region, first, last + 1 - first, 1);
	pthread_mutex_unlock(&region->uf->lock);
	restore_signals(&saved);
	return 0;
}

int umm_region_advise(struct umm_region *region, int advice)
{
	if (advice < UMM_REGION_NORMAL || advice > UMM_REGION_RANDOM)
		return -EINVAL;
	sigset_t saved;
	block_signals(&saved);
	pthread_mutex_lock(&region->uf->lock);
	region->advice = advice;
	pthread_mutex_unlock(&region->uf->lock);
	restore_signals(&saved);
	return 0;
}
