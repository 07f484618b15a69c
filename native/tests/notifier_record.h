/* A subscriber that writes down what it is told, for the tests of the sources of events. */
#ifndef UMM_TESTS_NOTIFIER_RECORD_H
#define UMM_TESTS_NOTIFIER_RECORD_H

#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "notifier/notifier.h"

enum { RECORD_MAX = 256 };

struct record {
	pthread_mutex_t lock;
	struct umm_notify_event events[RECORD_MAX];
	/* Was the first page of the range mapped, and was it 0x42 there, as the event came? */
	bool mapped[RECORD_MAX], filled[RECORD_MAX];
	int n;
	bool looks; /* fills in the two above: for memory that the callback may touch */
	struct umm_subscriber *subscriber;
	struct umm_subscription *subscription;
};

static inline bool is_mapped(uint64_t address)
{
	unsigned char vector;
	return mincore((void *)(uintptr_t)address, (size_t)getpagesize(), &vector) == 0;
}

static inline void record_one(struct record *record, const struct umm_notify_event *event)
{
	pthread_mutex_lock(&record->lock);
	CHECK(record->n < RECORD_MAX);
	record->events[record->n] = *event;
	if (record->looks) {
		bool mapped = is_mapped(event->start);
		record->mapped[record->n] = mapped;
		record->filled[record->n] =
		        mapped && *(volatile unsigned char *)(uintptr_t)event->start == 0x42;
	}
	record->n++;
	pthread_mutex_unlock(&record->lock);
}

static inline int record_start(void *context, const struct umm_notify_event *event)
{
	record_one(context, event);
	return 0;
}

static inline void record_void(void *context, const struct umm_notify_event *event)
{
	record_one(context, event);
}

static inline void record_open(struct record *record, uint64_t start, uint64_t end, bool looks)
{
	static const struct umm_notifier_ops ops = {.invalidate_range_start = record_start,
	        .invalidate_range_end = record_void,
	        .change = record_void};
	struct umm_subscriber_options options = {.name = "record", .ops = &ops};
	*record = (struct record){.lock = PTHREAD_MUTEX_INITIALIZER, .looks = looks};
	CHECK_OK(umm_subscriber_create(&options, &record->subscriber));
	CHECK_OK(umm_subscribe(
	        umm_space_self(), record->subscriber, start, end, record, &record->subscription));
}

static inline void record_close(struct record *record)
{
	CHECK_OK(umm_unsubscribe(record->subscription));
	CHECK_OK(umm_subscriber_destroy(record->subscriber));
}

static inline int record_count(struct record *record)
{
	pthread_mutex_lock(&record->lock);
	int n = record->n;
	pthread_mutex_unlock(&record->lock);
	return n;
}

#endif
