/* What the files of the notifier share.
 *
 * A space's subscriptions are a persistent treap, ordered by start and number, with the greatest end of each
 * subtree: a change copies the path to the root, publishes the new root, and frees what it replaced after a
 * grace period. Readers (walks) take no lock.
 *
 * Who changes memory counts itself into space->changes from before it looks at the tree until its end.
 * umm_subscribe publishes, then waits for all that were inside: a change that began before the
 * subscription was there, and so will never be told to it, has ended when umm_subscribe returns.
 *
 * A walk visits one subscription at a time: in RCU it finds the next one in order and counts a call in flight
 * (subscription->calls), then leaves RCU and calls. Unsubscribing takes it out of the tree, waits for a grace
 * period (nobody is between finding and counting), then for the calls.
 *
 * The end of a change goes to who was told its start, without any list of them: to the subscriptions that are
 * as old as the tree that the start began with (event.version >= birth) and still there.
 *
 * Locks: space->lock (writers of the tree) and waits_lock; mailbox->lock last, with signals blocked, as fault
 * handlers take it. None is held in a callback. */
#ifndef UMM_NOTIFIER_INTERNAL_H
#define UMM_NOTIFIER_INTERNAL_H

#include <pthread.h>

#include "notifier/mailbox.h"
#include "notifier/notifier.h"
#include "notifier/phases.h"

enum {
	CALLS_MASK = (1 << 24) - 1,
	CALLS_WAITED = 1 << 30, /* umm_unsubscribe sleeps on the word */
	CALLS_ORPHAN = 1 << 29, /* the last call, or umm_subscribe, frees the subscription */
	CALLS_HELD = 1 << 28,   /* umm_subscribe has not returned yet */
	SEQ_ACTIVE_BITS = 24,   /* of subscription->seq: changes under way; above: changes begun */
};

struct umm_subscription {
	_Atomic uint32_t calls; /* in flight, and flags */
	_Atomic uint64_t seq;
	_Atomic bool released;  /* `release` was claimed by somebody */
	_Atomic bool dead;      /* being unsubscribed: no call begins any more */
	_Atomic bool unsettled; /* a change may be under way that it is not told of */
	_Atomic uint32_t young; /* AGE of a sleeping subscriber: its answers */
	struct umm_subscriber *subscriber;
	struct umm_space *space;
	void *context;
	uint64_t start, end, birth;
	uint32_t epoch;
	struct umm_subscription *next_lost, *next_release; /* under the mailbox's lock */
	uint64_t lost_start, lost_end;
	bool in_lost, in_release, release_delivered;
};

struct node {
	struct node *left, *right;
	struct umm_subscription *subscription;
	uint64_t start, birth; /* the key; births are unique */
	uint64_t end, max_end;
	uint64_t priority;
	struct node *next_garbage; /* of the writers: readers do not look at it */
};

struct tree {
	struct node *root;
	uint64_t version; /* the greatest birth so far */
	struct tree *next_garbage;
};

struct umm_space {
	struct tree *_Atomic tree; /* NULL: no subscription */
	_Atomic uint32_t reading;  /* events of the kernel's that were read, perhaps, and not posted yet */
	_Atomic uint64_t generation;
	struct phases changes;
	pthread_mutex_t lock;
	uint64_t births;
	uint32_t n, pid, epoch;
	_Atomic bool released;
	struct node *garbage;
	struct tree *tree_garbage;
	uint32_t n_garbage;
};

struct umm_subscriber {
	char name[UMM_NOTIFY_NAME_MAX + 1];
	struct umm_notifier_ops ops;
	bool sleeping, pull;
	int late;
	uint64_t limit_ns;
	uint32_t epoch;
	_Atomic uint32_t n;       /* subscriptions */
	_Atomic uint32_t orphans; /* unsubscribed from a callback that has not returned */
	_Atomic uint64_t counts[UMM_NOTIFY_KINDS], again, late_count, lost, failed;
	struct mailbox mailbox; /* sleeping */
	pthread_t thread;
	bool has_thread;
	/* Direct with a limit: calls begun and ended, at which the watchdog looks (report.c). */
	_Atomic uint64_t begun, ended;
	struct umm_subscriber *next_watched;
	uint64_t seen_ended, seen_ns;
	bool stuck;
};

struct thread_state {
	struct frame *frames;
	uint32_t slot; /* 0: none yet */
	uint32_t open; /* changes between start and end */
};

extern _Thread_local struct thread_state umm_thread __attribute__((tls_model("initial-exec")));
unsigned thread_slot_take(void);

static inline unsigned thread_slot(void)
{
	return umm_thread.slot ? umm_thread.slot : thread_slot_take();
}

/* -- tree.c; space->lock held for changes --------------------------------------------------- */

struct cursor {
	uint64_t start, birth; /* of the last one visited; birth 0: none */
};
/* The first subscription after the cursor that touches [start, end) and is not younger than `version`. In
 * RCU. */
struct umm_subscription *tree_next(
        const struct tree *tree, uint64_t start, uint64_t end, uint64_t version, const struct cursor *after);
int tree_insert(struct umm_space *space, struct umm_subscription *subscription);
int tree_remove(struct umm_space *space, struct umm_subscription *subscription);
/* Frees what is replaced, after a grace period. */
void tree_collect(struct umm_space *space);
/* After a grace period. */
void tree_free_garbage(struct node *nodes, struct tree *trees);

/* -- subscribe.c ---------------------------------------------------------------------------- */

/* Counted in by who found it in RCU. */
static inline void call_enter(struct umm_subscription *subscription)
{
	atomic_fetch_add_explicit(&subscription->calls, 1, memory_order_acquire);
}
void call_leave_slow(struct umm_subscription *subscription, uint32_t old);
static inline void call_leave(struct umm_subscription *subscription)
{
	uint32_t old = atomic_fetch_sub_explicit(&subscription->calls, 1, memory_order_acq_rel);
	if (old & (CALLS_WAITED | CALLS_ORPHAN))
		call_leave_slow(subscription, old);
}
bool in_callback_of(const struct umm_subscription *subscription);
bool in_callback_of_subscriber(const struct umm_subscriber *subscriber);
bool claim_release(struct umm_subscription *subscription);
/* In this thread, with a frame. */
int call_here(struct umm_subscription *subscription, const struct umm_notify_event *event);
void unsubscribe_after_fork(void);

/* -- fork.c --------------------------------------------------------------------------------- */

extern _Atomic uint32_t umm_fork_epoch; /* grows in each child */
extern _Atomic uint32_t umm_forking;
extern struct umm_space umm_self;
void space_init(struct umm_space *space, uint32_t pid);

/* -- walk.c --------------------------------------------------------------------------------- */

/* The callback itself; the caller has made the frame. */
int call_ops(struct umm_subscription *subscription, const struct umm_notify_event *event);
void walk_after_fork(void);
/* -- report.c ------------------------------------------------------------------------------- */

void report_late(const char *name, const struct umm_notify_event *event, uint64_t waited_ns);
int watch_direct(struct umm_subscriber *subscriber);
void unwatch_direct(struct umm_subscriber *subscriber);
void report_before_fork(void);
void report_after_fork_parent(void);
void report_after_fork_child(void);

#endif
