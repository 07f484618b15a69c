/* The ring of events of other processes: nothing is lost silently, and nobody waits. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "notifier/event_ring.h"
#include "tests/check.h"

enum { WRITERS = 4, EVENTS = 5000, CAPACITY = 64 };

static struct umm_event_ring *ring;

static void *write_main(void *argument)
{
	uint32_t writer = (uint32_t)(uintptr_t)argument;
	for (uint64_t i = 0; i < EVENTS; i++) {
		struct umm_notify_event event = {.start = i, .end = ~i, .pid = writer, .id = i * 3};
		umm_event_ring_put(ring, &event);
	}
	return NULL;
}

static void many_write_one_reads(void)
{
	struct umm_notify_event events[16];
	pthread_t threads[WRITERS];
	uint64_t taken = 0, next[WRITERS] = {0}, seen;
	for (uintptr_t i = 0; i < WRITERS; i++)
		CHECK(pthread_create(&threads[i], NULL, write_main, (void *)i) == 0);
	do {
		uint64_t n = umm_event_ring_take(ring, events, 16);
		for (uint64_t i = 0; i < n; i++) {
			struct umm_notify_event *event = &events[i];
			CHECK(event->pid < WRITERS && event->start >= next[event->pid]);
			CHECK(event->end == ~event->start && event->id == event->start * 3);
			next[event->pid] = event->start + 1;
		}
		taken += n;
		seen = taken + umm_event_ring_lost(ring);
		if (!n)
			sched_yield();
	} while (seen < WRITERS * EVENTS);
	for (int i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(umm_event_ring_take(ring, events, 16), 0);
	CHECK_EQUAL(taken + umm_event_ring_lost(ring), WRITERS * EVENTS);
	CHECK(taken >= CAPACITY);
}

static void what_does_not_fit_is_counted(void)
{
	struct umm_notify_event event = {.start = 1, .end = 2}, events[CAPACITY * 2];
	uint64_t before = umm_event_ring_lost(ring);
	for (int i = 0; i < CAPACITY + 5; i++)
		umm_event_ring_put(ring, &event);
	CHECK_EQUAL(umm_event_ring_lost(ring), before + 5);
	CHECK_EQUAL(umm_event_ring_take(ring, events, CAPACITY * 2), CAPACITY);
	umm_event_ring_put(ring, &event);
	CHECK_EQUAL(umm_event_ring_take(ring, events, CAPACITY * 2), 1);
}

/* Killed between taking its place and writing: the others' events still come. */
static void a_killed_writer_is_passed(void)
{
	struct umm_notify_event event = {.start = 7, .end = 8}, got;
	uint64_t before = umm_event_ring_lost(ring);
	atomic_fetch_add(&ring->head, 1);
	umm_event_ring_put(ring, &event);
	while (!umm_event_ring_take(ring, &got, 1))
		usleep(1000);
	CHECK_EQUAL(got.start, 7);
	CHECK_EQUAL(umm_event_ring_lost(ring), before + 1);
}

static void opened_by_others(int fd)
{
	char path[64];
	struct umm_notify_event got;
	snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)getpid(), fd);
	fflush(NULL);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		struct umm_event_ring *own = umm_event_ring_open(path);
		struct umm_notify_event event = {.start = 11, .end = 12};
		if (!own)
			_exit(1);
		umm_event_ring_put(own, &event);
		_exit(0);
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK_EQUAL(umm_event_ring_take(ring, &got, 1), 1);
	CHECK_EQUAL(got.start, 11);
	CHECK_EQUAL(umm_event_ring_processes(ring), 1);
	CHECK(!umm_event_ring_open("/proc/self/exe"));
	CHECK(!umm_event_ring_open("/dev/null"));
	CHECK(!umm_event_ring_open("/no/such/file"));
}

int main(void)
{
	int fd;
	CHECK_EQUAL(umm_event_ring_create(0, &ring, &fd), -EINVAL);
	CHECK_EQUAL(umm_event_ring_create(48, &ring, &fd), -EINVAL);
	CHECK_EQUAL(umm_event_ring_create(UINT64_C(1) << 25, &ring, &fd), -EINVAL);
	CHECK_OK(umm_event_ring_create(CAPACITY, &ring, &fd));
	many_write_one_reads();
	what_does_not_fit_is_counted();
	a_killed_writer_is_passed();
	opened_by_others(fd);
	umm_event_ring_destroy(ring, fd);
	return 0;
}
