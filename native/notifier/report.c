/* Callbacks that take too long are reported by name: kept for who asks, and told to the reporter.
 *
 * Of sleeping subscribers the waiting side notices. Direct callbacks run in the thread that changes memory,
 * which nobody can take out of them: a watchdog looks at their counters now and then. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "notifier/internal.h"

enum { KEPT = 64 };
static const uint64_t least_period_ns = 1000000, most_period_ns = 1000000000;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct umm_notify_report kept[KEPT];
static uint64_t n_put, n_taken;

static void on_stderr(
        void *context, const char *name, const struct umm_notify_event *event, uint64_t waited_ns)
{
	(void)context;
	char line[256];
	int n = snprintf(line, sizeof(line),
	        "uspace_mm: notifier '%s' has not returned for %.3f s (pid %u, %#llx-%#llx); it is not "
	        "waited for\n",
	        name, (double)waited_ns / 1e9, event->pid, (unsigned long long)event->start,
	        (unsigned long long)event->end);
	if (n > 0 && write(STDERR_FILENO, line, (size_t)n < sizeof(line) ? (size_t)n : sizeof(line) - 1) < 0)
		return; /* nobody reads it: it is kept for umm_notify_take_report */
}

static umm_notify_reporter *reporter = on_stderr;
static void *reporter_context;

void umm_notify_keep_reports(
        void *context, const char *name, const struct umm_notify_event *event, uint64_t waited_ns)
{
	(void)context, (void)name, (void)event, (void)waited_ns;
}

void umm_notify_set_reporter(umm_notify_reporter *wanted, void *context)
{
	pthread_mutex_lock(&lock);
	reporter = wanted ? wanted : on_stderr;
	reporter_context = context;
	pthread_mutex_unlock(&lock);
}

void report_late(const char *name, const struct umm_notify_event *event, uint64_t waited_ns)
{
	struct umm_notify_report report = {.event = *event, .waited_ns = waited_ns};
	memcpy(report.name, name, strlen(name) + 1);
	pthread_mutex_lock(&lock);
	kept[n_put++ % KEPT] = report;
	if (n_put - n_taken > KEPT)
		n_taken = n_put - KEPT;
	umm_notify_reporter *call = reporter;
	void *context = reporter_context;
	pthread_mutex_unlock(&lock);
	call(context, report.name, event, waited_ns);
}

int umm_notify_take_report(struct umm_notify_report *ret)
{
	pthread_mutex_lock(&lock);
	int any = n_taken != n_put;
	if (any)
		*ret = kept[n_taken++ % KEPT];
	pthread_mutex_unlock(&lock);
	return any;
}

/* -- the watchdog of direct subscribers ----------------------------------------------------- */

static pthread_mutex_t watch_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER; /* of the thread; before watch_lock */
static pthread_cond_t watch_wake = PTHREAD_COND_INITIALIZER;
static struct umm_subscriber *watched;
static pthread_t watchdog;

static bool is_stuck(struct umm_subscriber *subscriber, uint64_t now)
{
	uint64_t ended = atomic_load(&subscriber->ended), begun = atomic_load(&subscriber->begun);
	if (ended != subscriber->seen_ended || begun == ended) {
		subscriber->seen_ended = ended;
		subscriber->seen_ns = now;
		subscriber->stuck = false;
		return false;
	}
	if (subscriber->stuck || now - subscriber->seen_ns < subscriber->limit_ns)
		return false;
	subscriber->stuck = true;
	return true;
}

static void *watchdog_main(void *argument)
{
	(void)argument;
	pthread_mutex_lock(&watch_lock);
	while (watched) {
		uint64_t period = most_period_ns, now = umm_now_ns();
		for (struct umm_subscriber *one = watched; one; one = one->next_watched) {
			if (one->limit_ns / 4 < period)
				period = one->limit_ns / 4;
			if (is_stuck(one, now)) {
				struct umm_notify_event event = {
				        .start = 0, .end = UINT64_MAX, .pid = umm_self.pid};
				atomic_fetch_add(&one->late_count, 1);
				report_late(one->name, &event, now - one->seen_ns);
			}
		}
		if (period < least_period_ns)
			period = least_period_ns;
		struct timespec at;
		clock_gettime(CLOCK_REALTIME, &at);
		uint64_t ns = (uint64_t)at.tv_nsec + period;
		at.tv_sec += (time_t)(ns / 1000000000);
		at.tv_nsec = (long)(ns % 1000000000);
		pthread_cond_timedwait(&watch_wake, &watch_lock, &at);
	}
	pthread_mutex_unlock(&watch_lock);
	return NULL;
}

int watch_direct(struct umm_subscriber *subscriber)
{
	int err = 0;
	subscriber->seen_ns = umm_now_ns();
	pthread_mutex_lock(&start_lock);
	pthread_mutex_lock(&watch_lock);
	bool first = !watched;
	subscriber->next_watched = watched;
	watched = subscriber;
	pthread_cond_signal(&watch_wake);
	pthread_mutex_unlock(&watch_lock);
	if (first) {
		sigset_t all, saved;
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &saved);
		err = pthread_create(&watchdog, NULL, watchdog_main, NULL);
		pthread_sigmask(SIG_SETMASK, &saved, NULL);
		if (err)
			watched = NULL;
		else
			pthread_setname_np(watchdog, "umm-notify-dog");
	}
	pthread_mutex_unlock(&start_lock);
	return -err;
}

void unwatch_direct(struct umm_subscriber *subscriber)
{
	pthread_mutex_lock(&start_lock);
	pthread_mutex_lock(&watch_lock);
	for (struct umm_subscriber **link = &watched; *link; link = &(*link)->next_watched)
		if (*link == subscriber) {
			*link = subscriber->next_watched;
			break;
		}
	bool last = !watched;
	pthread_cond_signal(&watch_wake);
	pthread_mutex_unlock(&watch_lock);
	if (last)
		pthread_join(watchdog, NULL);
	pthread_mutex_unlock(&start_lock);
}

void report_before_fork(void)
{
	pthread_mutex_lock(&start_lock);
	pthread_mutex_lock(&watch_lock);
	pthread_mutex_lock(&lock);
}

void report_after_fork_parent(void)
{
	pthread_mutex_unlock(&lock);
	pthread_mutex_unlock(&watch_lock);
	pthread_mutex_unlock(&start_lock);
}

void report_after_fork_child(void)
{
	/* The watched, and the thread, are the parent's. */
	watched = NULL;
	pthread_cond_init(&watch_wake, NULL);
	report_after_fork_parent();
}
