/* The queue of a sleeping subscriber: events in order, answered one at a time.
 *
 * Events hold a call in flight of their subscription until they are answered. A start reserves room for its
 * end, so that pairs stay balanced when the queue is full: then the pair is left out as a whole, its range is
 * noted, and told later as UMM_REASON_LOST. */
#ifndef UMM_NOTIFIER_MAILBOX_H
#define UMM_NOTIFIER_MAILBOX_H

#include <pthread.h>
#include <signal.h>

#include "notifier/notifier.h"

struct letter {
	struct umm_notify_event event;
	struct umm_subscription *subscription; /* NULL: taken back */
};

struct open_pair {
	uint64_t id;
	struct umm_subscription *subscription;
};

/* A callback that a thread is in. */
struct frame {
	struct umm_subscription *subscription;
	struct frame *previous;
};

struct mailbox {
	pthread_mutex_t lock;
	pthread_cond_t arrived, answered;
	struct letter *letters;
	struct open_pair *pairs;
	uint32_t capacity, n_pairs, pairs_capacity, pair_hint;
	uint64_t head, tail; /* letters taken, letters put */
	uint64_t done;       /* letters answered */
	struct umm_subscription *lost, *releases;
	struct umm_notify_event release_event;
	struct letter current; /* between next and done */
	bool busy;
	bool current_is_letter;
	struct umm_subscription
	        *lost_end_due; /* of a LOST pair whose start was given, with its call in flight */
	struct umm_notify_event lost_event;
	uint64_t busy_since;
	bool reported;  /* the callback under way was */
	bool overtaken; /* a change did not wait for the callback under way */
	bool closed;
	int fd; /* eventfd, -1 */
	struct frame frame;
};

int mailbox_init(struct mailbox *box, uint32_t capacity);
void mailbox_deinit(struct mailbox *box);

/* With signals blocked: a signal handler that touches region memory waits for a fault handler, which may be
 * about to put a letter. */
void mailbox_lock(struct mailbox *box, sigset_t *saved);
void mailbox_unlock(struct mailbox *box, const sigset_t *saved);

/* The caller has counted a call in flight; a letter put takes one of its own. Without room the range is noted
 * as lost; an end whose start was not put is dropped. */
void mailbox_put(struct umm_subscription *subscription, const struct umm_notify_event *event);
/* Told apart from the queue, exactly once, whatever is full; unless it was claimed. Claimed and put in one
 * step: who unsubscribes in between would find neither. */
void mailbox_put_release(struct umm_subscription *subscription, const struct umm_notify_event *event);
/* Until everything put so far is answered. 0; -ETIMEDOUT: not within the subscriber's limit; -EAGAIN: a fork
 * began (voluntary changes); also 0 when the subscription ended or the mailbox closed. */
int mailbox_wait(struct umm_subscription *subscription, const struct umm_notify_event *event);
void mailbox_wait_release(struct umm_subscription *subscription, const struct umm_notify_event *event);
/* True when nobody claimed it, or when it waited to be delivered; it is the caller's now. */
bool mailbox_claim_release(struct umm_subscription *subscription);
/* Letters of a subscription that ends are taken back, and whoever waits for it goes on. */
void mailbox_purge(struct umm_subscription *subscription);
/* The range is told as UMM_REASON_LOST once the queue is empty. Lock held. */
void mailbox_lose(struct mailbox *box, struct umm_subscription *subscription, uint64_t start, uint64_t end);
/* queued, busy_ns */
void mailbox_stats(struct mailbox *box, struct umm_subscriber_stats *ret);

#endif
