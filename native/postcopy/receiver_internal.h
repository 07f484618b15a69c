/* What the files of the receiver share: receiver.c until the switch, receiver_postcopy.c after it. */
#ifndef UMM_POSTCOPY_RECEIVER_INTERNAL_H
#define UMM_POSTCOPY_RECEIVER_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>

#include "postcopy/bitmap.h"
#include "postcopy/channel.h"
#include "postcopy/receiver.h"
#include "store/store.h"

/* The store of the region. It outlives neither: the receiver is destroyed after the region was closed. */
struct umm_receiver_store {
	struct umm_store store;
	struct umm_receiver *receiver;
};

struct umm_receiver {
	struct umm_receiver_store store;
	struct umm_channel data, urgent;
	uint8_t *memory; /* mapped here; the region's from enter on */
	uint64_t pages, session, zero_digest;
	uint32_t page_size, max_pages;
	int stopfd, wakefd; /* eventfds: end every wait; look at `unsent` and `leaving` */
	unsigned idle_ms;
	_Atomic int phase;

	uint8_t *missing;    /* bitmap: of the switch */
	uint8_t *arrived;    /* bitmap: here; set before the pager is told */
	uint8_t *states;     /* enum umm_page_state */
	uint64_t *digests;   /* of the content that came last, computed here */
	uint8_t *buffers[2]; /* [enum umm_connection]: a frame's pages */

	struct umm_pager *pager;
	struct umm_region *region;
	pthread_t threads[2];
	unsigned started;
	_Atomic bool leaving; /* no more requests: everything is here, or the connection is lost */
	_Atomic int error;    /* the first one of either thread */
	_Atomic uint64_t installed, zero_pages, urgent_pages, bulk_pages, duplicates, requests, lost;
	_Atomic uint64_t last_page_at, last_sign_at;

	/* Monotonic times per page, 0: not asked for. */
	uint64_t *asked_at, *sent_at;
	struct umm_histogram latency;
	uint64_t slowest_ns, slowest_queue_ns, slowest_fetch_ns; /* under lock */

	/* Requests. request_lock is held for one non-blocking send; nothing that could fault runs under it.
	 */
	pthread_mutex_t request_lock;
	uint8_t tail[UMM_FRAME_HEADER]; /* of a request that the socket took only a part of */
	unsigned tail_len;
	uint8_t *unsent; /* bitmap: asked for while the socket was full */
	_Atomic bool any_unsent;

	/* For the driving thread. */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool complete;
	_Atomic bool verdict_came;
	uint64_t switch_came_at, running_at;
	struct umm_receiver_stats stats;
	char state[UMM_FRAME_MAX_TEXT + 1], verdict[UMM_FRAME_MAX_TEXT + 1];
	uint32_t state_len, verdict_len;
	char text[300];
};

/* Receive the payload of a PAGES frame to `to`, check and keep the digests. */
int umm_receiver_take_pages(struct umm_receiver *receiver, struct umm_channel *channel,
        const struct umm_frame *frame, uint8_t *to, uint64_t *digests);
/* Waits for the receiving threads; umm_receiver_stop makes them end. */
void umm_receiver_join(struct umm_receiver *receiver);
void umm_receiver_store_init(struct umm_receiver *receiver);
void *umm_receiver_urgent_main(void *receiver);
void *umm_receiver_data_main(void *receiver);
/* Send what queued up while the socket was full. */
void umm_receiver_send_queued(struct umm_receiver *receiver);
int umm_receiver_failed(struct umm_receiver *receiver, struct umm_channel *channel, int error);

static inline void umm_receiver_set_state(struct umm_receiver *receiver, uint64_t page, uint8_t state)
{
	__atomic_store_n(&receiver->states[page], state, __ATOMIC_RELAXED);
}

#endif
