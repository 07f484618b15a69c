/* Notifiers: whoever holds an outside reference to memory is told before the memory goes away.
 *
 * The kernel's mmu_notifier (include/linux/mmu_notifier.h) for user space. An address space has
 * subscriptions, each on an interval of it (the whole of it is an interval, too). Who changes memory brackets
 * the change with umm_notify_start and umm_notify_end; every subscription whose interval the range touches is
 * told.
 *
 * Two classes of subscribers, as in the kernel's core series of 2008:
 *   direct:   the callback runs in the thread that changes the memory, maybe under a lock of the pager's. It
 *             must not block, must not touch memory of a region, and must not call the pager.
 *   sleeping: the callback runs in a thread of the subscriber's own, and may sleep. Who changes the memory
 *             waits for it up to `limit_ns` (0: does not wait at all).
 *
 * All functions return 0 or -errno, and may be called from any thread but not from a signal handler. */
#ifndef UMM_NOTIFIER_NOTIFIER_H
#define UMM_NOTIFIER_NOTIFIER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct umm_space;        /* an address space: this process's, or another's */
struct umm_subscriber;   /* who is told: name, callbacks, class, statistics */
struct umm_subscription; /* of one subscriber, on one interval of one space */

/* Who saw it. */
enum umm_notify_source {
	UMM_SOURCE_PAGER,   /* our pager: eviction, closing, poison */
	UMM_SOURCE_CALL,    /* a call made through umm_mm_* */
	UMM_SOURCE_PRELOAD, /* a call that the preloaded library caught */
	UMM_SOURCE_KERNEL,  /* an event of a userfaultfd */
	UMM_SOURCE_SAMPLE,  /* maps and PAGEMAP_SCAN, at an interval */
	UMM_SOURCE_PIDFD,   /* another process ended */
	UMM_SOURCE_POSTCOPY,
	UMM_SOURCE_POOL,
	UMM_SOURCE_PROCESS, /* this process: fork, exec, exit */
	UMM_SOURCE_USER,    /* umm_notify_* called by code of the user's */
	UMM_SOURCE_LIBRARY, /* of the library about itself: unregistered, events lost */
	UMM_SOURCES,
};

/* What happens to the memory. */
enum umm_notify_reason {
	UMM_REASON_EVICT,   /* its pages leave; the content stays, elsewhere */
	UMM_REASON_UNMAP,   /* munmap, MAP_FIXED over it, a region closed */
	UMM_REASON_MOVE,    /* mremap: the pages go to `to` */
	UMM_REASON_REMOVE,  /* MADV_DONTNEED, MADV_FREE, MADV_REMOVE, a hole: the content goes */
	UMM_REASON_POISON,  /* an access is SIGBUS from now on */
	UMM_REASON_BACKING, /* other pages with the same content: MADV_COLLAPSE, migration, compaction */
	UMM_REASON_PROTECT, /* write-protected: mprotect, fork's copy on write */
	UMM_REASON_SWITCH,  /* postcopy: the memory lives on another machine now */
	UMM_REASON_FORK,
	UMM_REASON_EXEC,
	UMM_REASON_EXIT,
	UMM_REASON_MAP,        /* sampled: a mapping appeared */
	UMM_REASON_PRESENCE,   /* sampled: pages came or went */
	UMM_REASON_UNREGISTER, /* release, as the subscription ends */
	UMM_REASON_LOST, /* events of this range were lost (queue full, subscriber late): assume anything */
	UMM_REASON_OTHER,
	UMM_REASONS,
};

/* What the source promises. */
enum umm_notify_promise {
	UMM_PROMISE_ORDERED, /* start before anything changes, end after all of it */
	UMM_PROMISE_BEFORE,  /* told before the change, of which no end is seen (REMOVE); start and end come
	                        together */
	UMM_PROMISE_AFTER,   /* told after the change (UNMAP, REMAP, a process's end); start and end come
	                        together */
	UMM_PROMISE_SAMPLED, /* some time after; what came and went in between was not seen */
	UMM_PROMISES,
};

enum umm_notify_kind {
	UMM_NOTIFY_START,
	UMM_NOTIFY_END,
	UMM_NOTIFY_PAGE,
	UMM_NOTIFY_CHANGE,
	UMM_NOTIFY_AGE,
	UMM_NOTIFY_RELEASE,
	UMM_NOTIFY_KINDS,
};

enum {
	UMM_NOTIFY_BLOCKABLE = 1 << 0, /* the side that changes the memory can wait */
	UMM_NOTIFY_VOLUNTARY = 1 << 1, /* it can do without the change (eviction): it gives up while a fork is
	                                  under way, and for late subscribers that say so */
	UMM_NOTIFY_NO_WAIT = 1 << 2,   /* sleeping subscribers are told but not waited for: they may need what
	                                  this thread holds */
	UMM_NOTIFY_NAME_MAX = 63,      /* bytes of a subscriber's name */
};

struct umm_notify_event {
	uint64_t start, end; /* the range, [start, end) */
	uint64_t to;         /* UMM_REASON_MOVE: where `start` is now; else 0 */
	uint64_t id;         /* of the change: its start and its end have the same */
	uint64_t generation; /* of the space when this was seen; grows with every change */
	int32_t error;       /* UMM_NOTIFY_END: 0, or -errno with which the change failed */
	uint32_t flags;      /* UMM_NOTIFY_BLOCKABLE, UMM_NOTIFY_VOLUNTARY */
	uint8_t kind, source, reason, promise;
	uint32_t pid; /* of the address space */
};

/* Callbacks; any may be NULL. `context` is the subscription's. */
struct umm_notifier_ops {
	/* The address space goes away, or (reason UNREGISTER) the subscription does: exactly once for each
	 * subscription, whichever comes first, before the memory. */
	void (*release)(void *context, const struct umm_notify_event *event);
	/* Drop what you hold of the range. 0; or, where event->flags lacks UMM_NOTIFY_BLOCKABLE and you would
	 * have to wait, -EAGAIN: the change is put off. (Of direct subscribers. Sleeping ones answer too late
	 * for that: what they return is ignored, and the end comes.) */
	int (*invalidate_range_start)(void *context, const struct umm_notify_event *event);
	/* For every start that returned 0, and for no other. You may take hold of the range again. */
	void (*invalidate_range_end)(void *context, const struct umm_notify_event *event);
	/* One unit has gone already, and is not used anew before you return. */
	void (*invalidate_page)(void *context, const struct umm_notify_event *event);
	/* 1: you used the range since the last call (a young bit, cleared by this call), else 0. */
	int (*age)(void *context, const struct umm_notify_event *event);
	/* The same address has other pages with the same content. */
	void (*change)(void *context, const struct umm_notify_event *event);
};

enum umm_subscriber_late {
	UMM_LATE_GO_ON, /* after limit_ns the change happens without its answer; it is told UMM_REASON_LOST */
	UMM_LATE_KEEP,  /* voluntary changes are given up while it has not answered; others go on */
};

struct umm_subscriber_options {
	const char *name;                   /* for reports; cut at UMM_NOTIFY_NAME_MAX bytes */
	const struct umm_notifier_ops *ops; /* NULL with `pull` */
	bool sleeping;                      /* else direct */
	bool pull; /* sleeping, without a thread of ours: umm_subscriber_next/done are called instead */
	int late;  /* enum umm_subscriber_late */
	uint64_t limit_ns; /* sleeping: how long a change waits for an answer; 0: it does not wait.
	                      direct: after how long a callback is reported; 0: never */
	uint32_t queue;    /* sleeping: events that may wait; 0: 1024 */
};

struct umm_subscriber_stats {
	uint64_t calls[UMM_NOTIFY_KINDS]; /* callbacks begun */
	uint64_t again;                   /* -EAGAIN answers to changes that could not wait */
	uint64_t late;                    /* changes that went on, or were given up, without its answer */
	uint64_t lost;                    /* events that found the queue full */
	uint64_t queued;                  /* now */
	uint64_t busy_ns;                 /* of the callback that runs now (sleeping); 0: none */
	uint64_t failed; /* umm_subscriber_failed: exceptions of callbacks written in Python */
};

/* -- address spaces: space.c ---------------------------------------------------------------- */

/* This process's. Lives as long as the process; a forked child has one of its own, without subscriptions. */
struct umm_space *umm_space_self(void);
/* Another process's, of which somebody else reports events (umm_notify_post). */
int umm_space_create(uint32_t pid, struct umm_space **ret);
/* Releases it, if nobody did; its subscriptions are still to be unregistered by their owners. -EBUSY: there
 * are some. Not for umm_space_self. */
int umm_space_destroy(struct umm_space *space);
/* Grows with every change that is told of, seen by the kernel or made through us. */
uint64_t umm_space_generation(const struct umm_space *space);
uint32_t umm_space_pid(const struct umm_space *space);
uint32_t umm_space_subscriptions(struct umm_space *space);
/* `release` for every subscription that had none. reason: EXIT, EXEC. Later changes are told to nobody. */
void umm_space_release(struct umm_space *space, int source, int reason, int promise);
/* exec failed: the space lives on. Who was released stays so; it can be subscribed to anew. */
void umm_space_revive(struct umm_space *space);

/* -- subscribing: subscribe.c --------------------------------------------------------------- */

int umm_subscriber_create(const struct umm_subscriber_options *options, struct umm_subscriber **ret);
/* -EBUSY while it has subscriptions. Stops its thread. From a callback of its own: -EDEADLK. */
int umm_subscriber_destroy(struct umm_subscriber *subscriber);
void umm_subscriber_stats(struct umm_subscriber *subscriber, struct umm_subscriber_stats *ret);
const char *umm_subscriber_name(const struct umm_subscriber *subscriber);
void umm_subscriber_failed(struct umm_subscriber *subscriber);

/* Told of changes that touch [start, end); 0 and UINT64_MAX: of all. When it returns, changes that began
 * before have ended (but not in a callback, where that cannot be waited for: umm_read_begin waits then).
 * -EINVAL: start >= end. -ESRCH: the space was released. */
int umm_subscribe(struct umm_space *space, struct umm_subscriber *subscriber, uint64_t start, uint64_t end,
        void *context, struct umm_subscription **ret);
/* Calls `release` (reason UNREGISTER) if it was not called yet, and returns when no callback of this
 * subscription runs any more, except the one that it is called from; it is never called afterwards, and the
 * handle is no longer valid. 0, or -EDEADLK: two callbacks unregister each other; both are
 * unregistered, but the other callback may still be running. */
int umm_unsubscribe(struct umm_subscription *subscription);
/* For pull mode, before umm_unsubscribe: 1 when `release` is still due and now the caller's to call (and
 * nobody else's), else 0. */
int umm_subscription_claim_release(struct umm_subscription *subscription);
void umm_subscription_range(const struct umm_subscription *subscription, uint64_t *start, uint64_t *end);
/* The context, subscriber of a subscription: for umm_subscriber_next. */
void *umm_subscription_context(const struct umm_subscription *subscription);

/* Pull mode, and what the threads of sleeping subscribers run: waits for the next event. 0; -ETIMEDOUT;
 * -ESHUTDOWN: the subscriber is being destroyed (umm_subscriber_wake), or it is in a forked child.
 * Until `done` is called by the same thread, the event counts as a callback in flight. */
int umm_subscriber_next(struct umm_subscriber *subscriber, uint64_t timeout_ns,
        struct umm_notify_event *event, struct umm_subscription **subscription);
/* result: what the callback returned. */
void umm_subscriber_done(struct umm_subscriber *subscriber, int result);
/* next() returns -ESHUTDOWN from now on. */
void umm_subscriber_close(struct umm_subscriber *subscriber);
/* Readable while events wait (an eventfd, owned by the subscriber), for poll and asyncio; or -errno. */
int umm_subscriber_fd(struct umm_subscriber *subscriber);

/* Is this thread in a callback? Then whoever changes memory may be waiting for it. */
bool umm_notify_in_callback(void);

/* -- telling: walk.c; no malloc, no lock ---------------------------------------------------- */

/* A change under way. Given by the caller, on its stack; not to be looked into. */
struct umm_notify_range {
	struct umm_notify_event event;
	struct umm_space *space;
	uint64_t version; /* of the set of subscriptions that were told */
	_Atomic uint64_t *counter;
	uint32_t epoch; /* a child that forked in between tells no end */
};

/* Before memory in [start, end) changes. flags: UMM_NOTIFY_*. 0: change it, then call umm_notify_end, also
 * when the change fails. -EAGAIN: somebody would have to wait, or a fork is under way: do not change it,
 * there is no end to tell (who was told has been told the end), try again later. -EBUSY: the same, because of
 * a late UMM_LATE_KEEP subscriber. With BLOCKABLE and without VOLUNTARY: always 0. Nests. */
int umm_notify_start(struct umm_notify_range *range, struct umm_space *space, uint64_t start, uint64_t end,
        int source, int reason, uint32_t flags);
/* UMM_REASON_MOVE: says where to, in the end event. */
static inline void umm_notify_moved(struct umm_notify_range *range, uint64_t to)
{
	range->event.to = to;
}
/* error: 0, or -errno of the change. */
void umm_notify_end(struct umm_notify_range *range, int error);
/* invalidate_page, change: waits for sleeping subscribers where flags has BLOCKABLE. */
void umm_notify_page(
        struct umm_space *space, uint64_t start, uint64_t end, int source, int reason, uint32_t flags);
void umm_notify_change(
        struct umm_space *space, uint64_t start, uint64_t end, int source, int reason, uint32_t flags);
/* Young bits of all subscribers together, each cleared: 1 or 0. `answered`: how many were asked and answered.
 */
int umm_notify_age(struct umm_space *space, uint64_t start, uint64_t end, int source, uint64_t *answered);
/* What somebody saw without being part of it: start and end at once, promise BEFORE, AFTER or SAMPLED. Never
 * waits; may be called by fault handlers with their locks held. */
void umm_notify_post(struct umm_space *space, uint64_t start, uint64_t end, uint64_t to, int source,
        int reason, int promise);

/* Around many small changes, so that they cost nothing while nobody subscribes: true when somebody does, and
 * then each change is to be told of with start and end. Who subscribes after it is not told of these changes,
 * and umm_subscribe waits for their end. */
struct umm_notify_entry {
	_Atomic uint64_t *counter;
	uint32_t epoch;
};
bool umm_notify_enter(struct umm_space *space, struct umm_notify_entry *entry);
void umm_notify_leave(struct umm_space *space, struct umm_notify_entry *entry);

/* Around "read an event of the kernel's and post it": the side that changed the memory goes on when the event
 * was read, so from before the read until after the post nobody may believe that nothing changed. */
struct umm_notify_reading {
	_Atomic uint64_t *counter;
	uint32_t epoch;
	bool counted;
};
void umm_notify_reading_begin(struct umm_space *space, struct umm_notify_reading *reading);
void umm_notify_reading_end(struct umm_space *space, struct umm_notify_reading *reading);

/* Between forking_begin and forking_end voluntary changes give up instead of waiting for subscribers: who
 * forks holds locks that those may need. Called around fork() by the pager, before it takes its locks. */
void umm_notify_forking(bool begin);

/* -- interval readers: read.c --------------------------------------------------------------- */

/* As mmu_interval_read_begin/read_retry, for one who builds a shadow mapping without a lock:
 *
 *   do {
 *           seq = begin();  look the pages up
 *   } while (retry(seq));   use them: they were right at some moment since begin(); keep the pair
 *                           retry-and-publish in one step with your own callback.
 *
 * Waits until no change of the interval is under way. 0; -ETIMEDOUT; -EDEADLK from a callback; -ESRCH after
 * release. */
int umm_read_begin(struct umm_subscription *subscription, uint64_t timeout_ns, uint64_t *seq);
/* Did a change of the interval begin since? */
bool umm_read_retry(struct umm_subscription *subscription, uint64_t seq);

/* -- reports: report.c ---------------------------------------------------------------------- */

/* A callback that took too long, once for each time it is stuck. Called by a thread of the library's. NULL:
 * one line on stderr, which is how it is at first. */
typedef void umm_notify_reporter(
        void *context, const char *name, const struct umm_notify_event *event, uint64_t waited_ns);
/* Does nothing: for who takes the reports (umm_notify_take_report) and wants no line on stderr. */
void umm_notify_keep_reports(
        void *context, const char *name, const struct umm_notify_event *event, uint64_t waited_ns);
void umm_notify_set_reporter(umm_notify_reporter *reporter, void *context);
/* The oldest report that nobody took (64 are kept): 1, or 0 when there is none. */
struct umm_notify_report {
	char name[UMM_NOTIFY_NAME_MAX + 1];
	struct umm_notify_event event;
	uint64_t waited_ns;
};
int umm_notify_take_report(struct umm_notify_report *ret);

#endif
