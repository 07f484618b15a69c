/* The destination's driving thread from the switch on: the memory becomes a region, and is left in the end.
 */
#include "postcopy/receiver_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/clock.h"
#include "notifier/notifier.h"
#include "pager/pager.h"
#include "postcopy/sender.h"
#include "postcopy/thread.h"

static int start_thread(struct umm_receiver *receiver, void *(*run)(void *))
{
	int error = umm_thread_start(&receiver->threads[receiver->started], run, receiver);
	receiver->started += !error;
	return error;
}

void umm_receiver_join(struct umm_receiver *receiver)
{
	while (receiver->started)
		pthread_join(receiver->threads[--receiver->started], NULL);
}

/* Old versions of missing pages were received in a round: they must be missing, so that a touch faults. */
static int drop_missing(struct umm_receiver *receiver)
{
	const uint64_t size = receiver->page_size, pages = receiver->pages;
	uint64_t first = 0;
	while ((first = umm_bitmap_next(receiver->missing, pages, first, true)) < pages) {
		uint64_t end = umm_bitmap_next(receiver->missing, pages, first, false);
		if (madvise(receiver->memory + first * size, (end - first) * size, MADV_DONTNEED))
			return -errno;
		first = end;
	}
	return 0;
}

static int fail_words(struct umm_receiver *receiver, int error, const char *what)
{
	if (error && !receiver->text[0])
		snprintf(receiver->text, sizeof receiver->text, "%s: %s", what, strerror(-error));
	return error;
}

static int become_region(struct umm_receiver *receiver)
{
	int error = drop_missing(receiver);
	if (error)
		return fail_words(receiver, error, "madvise(MADV_DONTNEED) of the missing pages");
	for (uint64_t i = 0; i < umm_bitmap_bytes(receiver->pages); i++)
		receiver->arrived[i] = (uint8_t)~receiver->missing[i];
	umm_receiver_store_init(receiver);
	const struct umm_region_options options = {
	        .size = umm_receiver_size(receiver),
	        .unit = receiver->page_size,
	        .fork_policy = UMM_FORK_EXCLUDE,
	        .address = umm_receiver_address(receiver),
	        .present = receiver->arrived,
	};
	error = umm_region_create(receiver->pager, &receiver->store.store, &options, &receiver->region);
	return fail_words(receiver, error, "the received memory cannot become a region of the pager");
}

int umm_receiver_enter(struct umm_receiver *receiver)
{
	if (atomic_load(&receiver->phase) != UMM_PHASE_PRECOPY || !receiver->switch_came_at)
		return -EINVAL;
	const uint64_t start = umm_receiver_address(receiver), end = start + umm_receiver_size(receiver);
	struct umm_notify_range range;
	(void)umm_notify_start(&range, umm_space_self(), start, end, UMM_SOURCE_POSTCOPY, UMM_REASON_SWITCH,
	        UMM_NOTIFY_BLOCKABLE);
	int error = become_region(receiver);
	umm_notify_end(&range, error);
	if (error)
		return error;
	umm_notify_change(
	        umm_space_self(), start, end, UMM_SOURCE_POSTCOPY, UMM_REASON_BACKING, UMM_NOTIFY_BLOCKABLE);
	(void)umm_region_advise(receiver->region, UMM_REGION_RANDOM); /* the stream is the prefetch */
	receiver->data.protocol.phase = receiver->urgent.protocol.phase = UMM_PHASE_POSTCOPY;
	atomic_store(&receiver->phase, UMM_PHASE_POSTCOPY);
	if (!receiver->stats.missing_pages)
		atomic_store(&receiver->leaving, true);
	error = start_thread(receiver, umm_receiver_data_main);
	if (!error)
		error = start_thread(receiver, umm_receiver_urgent_main);
	if (error)
		umm_receiver_stop(receiver); /* what is missing fails */
	return fail_words(receiver, error, "pthread_create");
}

int umm_receiver_running(struct umm_receiver *receiver)
{
	if (atomic_load(&receiver->phase) != UMM_PHASE_POSTCOPY)
		return -EINVAL;
	receiver->running_at = umm_now_ns();
	return umm_channel_send(
	        &receiver->data, &(struct umm_frame){.type = UMM_FRAME_RUNNING}, NULL, 0, NULL, 0);
}

static struct timespec in_ns(uint64_t ns)
{
	ns += umm_now_ns();
	return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}

int umm_receiver_await_complete(struct umm_receiver *receiver, unsigned timeout_ms)
{
	struct timespec until = in_ns(timeout_ms * 1000000ull);
	int error = 0;
	pthread_mutex_lock(&receiver->lock);
	while (!receiver->complete && !error && !(error = atomic_load(&receiver->error)))
		error = -pthread_cond_timedwait(&receiver->changed, &receiver->lock, &until);
	if (receiver->complete)
		error = 0;
	pthread_mutex_unlock(&receiver->lock);
	return error;
}

int umm_receiver_finish(struct umm_receiver *receiver, const char *text, uint32_t len, const char **verdict,
        uint32_t *verdict_len)
{
	if (atomic_load(&receiver->phase) != UMM_PHASE_FINISH || len > UMM_FRAME_MAX_TEXT)
		return -EINVAL;
	int error = umm_channel_send(
	        &receiver->data, &(struct umm_frame){.type = UMM_FRAME_FINISH}, text, len, NULL, 0);
	atomic_store(&receiver->last_sign_at, umm_now_ns());
	pthread_mutex_lock(&receiver->lock);
	while (!error && !receiver->verdict_came && !(error = atomic_load(&receiver->error))) {
		struct timespec until = in_ns(100000000);
		(void)pthread_cond_timedwait(&receiver->changed, &receiver->lock, &until);
		if (umm_now_ns() - atomic_load(&receiver->last_sign_at) > receiver->idle_ms * 1000000ull &&
		        !receiver->verdict_came)
			error = umm_channel_fail(&receiver->data, -ETIMEDOUT,
			        "no verdict and no sign of life from the source for %u ms",
			        receiver->idle_ms);
	}
	if (receiver->verdict_came)
		error = 0;
	umm_receiver_failed(receiver, &receiver->data, error);
	pthread_mutex_unlock(&receiver->lock);
	if (error)
		return error;
	receiver->verdict[receiver->verdict_len] = 0;
	*verdict = receiver->verdict;
	*verdict_len = receiver->verdict_len;
	atomic_store(&receiver->phase, UMM_PHASE_DONE);
	return 0;
}

int umm_receiver_leave(struct umm_receiver *receiver)
{
	umm_receiver_stop(receiver);
	umm_receiver_join(receiver);
	int error = 0;
	if (receiver->region)
		error = umm_region_close(receiver->region);
	else if (receiver->memory)
		munmap(receiver->memory, receiver->pages * receiver->page_size);
	receiver->region = NULL;
	receiver->memory = NULL;
	if (receiver->pager && !error)
		error = umm_pager_destroy(receiver->pager);
	receiver->pager = NULL;
	return error;
}

int umm_receiver_guard_enter(struct umm_receiver *receiver)
{
	(void)receiver;
	return umm_guard_enter();
}

int umm_receiver_guard_leave(struct umm_receiver *receiver, uint64_t *lost)
{
	(void)receiver;
	struct umm_lost first = {0};
	int error = umm_guard_leave(&first);
	*lost = first.units;
	return error;
}

static int count_overtaken(struct umm_receiver *receiver, uint64_t *ret)
{
	struct umm_pager_stats *stats = malloc(sizeof *stats); /* too large for a stack */
	if (!stats)
		return -ENOMEM;
	int error = umm_region_stats(receiver->region, stats);
	*ret = error ? 0 : stats->counters.faults_stale;
	free(stats);
	return error;
}

int umm_receiver_faults(struct umm_receiver *receiver, struct umm_receiver_faults *ret)
{
	memset(ret, 0, sizeof *ret);
	if (!receiver->region)
		return 0;
	struct umm_histogram total = {0};
	umm_histogram_add(&total, &receiver->latency);
	ret->count = total.count;
	ret->p50_ns = umm_histogram_quantile(&total, 0.5);
	ret->p99_ns = umm_histogram_quantile(&total, 0.99);
	ret->p999_ns = umm_histogram_quantile(&total, 0.999);
	pthread_mutex_lock(&receiver->lock);
	ret->max_ns = receiver->slowest_ns;
	ret->slowest_queue_ns = receiver->slowest_queue_ns;
	ret->slowest_fetch_ns = receiver->slowest_fetch_ns;
	ret->slowest_install_ns = ret->max_ns - ret->slowest_queue_ns - ret->slowest_fetch_ns;
	pthread_mutex_unlock(&receiver->lock);
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++) {
		if (!total.buckets[i])
			continue;
		struct umm_receiver_bucket *bucket = &ret->buckets[ret->buckets_used++];
		umm_histogram_bounds(i, &bucket->low, &bucket->high);
		bucket->count = total.buckets[i];
	}
	return count_overtaken(receiver, &ret->overtaken);
}
