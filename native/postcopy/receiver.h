/* The destination's side of a migration: memory that fills up, and that is used before it is full.
 *
 * One thread drives it: create, connect (DATA, then URGENT), precopy, enter, running, then await_complete
 * and finish, while other threads use the memory; at last leave and destroy. After enter the memory is a
 * region of a pager of the receiver's own, whose missing pages come from here; two threads receive them.
 * When a connection is lost, the pages that did not arrive fail: their readers get SIGBUS. */
#ifndef UMM_POSTCOPY_RECEIVER_H
#define UMM_POSTCOPY_RECEIVER_H

#include <stdint.h>

#include "common/histogram.h"

struct umm_receiver;

struct umm_receiver_stats {
	uint64_t pages_total, page_size;
	uint64_t bytes_received;
	uint64_t rounds;
	uint64_t precopy_pages; /* received in rounds with content, those received again included */
	uint64_t zero_pages;    /* ranges that came as zeros, in pages, both phases */
	uint64_t missing_pages; /* at the switch */
	uint64_t arrived_pages; /* of the missing ones */
	uint64_t urgent_pages, bulk_pages; /* of the arrived ones, by the connection that was first */
	uint64_t duplicate_pages;
	uint64_t lost_pages; /* failed, because a connection was lost */
	uint64_t requests;   /* frames sent */
	uint64_t verified, mismatched;
	uint64_t entered_ns;   /* monotonic: RUNNING was sent */
	uint64_t switch_ns;    /* from SWITCH received to RUNNING sent */
	uint64_t last_page_ns; /* from RUNNING sent to the last page installed */
	uint32_t phase;        /* enum umm_phase */
	int32_t error;         /* of the receiving threads: -errno */
};

/* How faults that had to ask the source were served, in nanoseconds: from the handler's asking to the wake.
 */
struct umm_receiver_bucket {
	uint64_t low, high, count; /* latencies in [low, high) */
};
struct umm_receiver_faults {
	uint64_t count, p50_ns, p99_ns, p999_ns, max_ns;
	/* Of the slowest one: until the request was in the socket, until the page was here, until the wake.
	 */
	uint64_t slowest_queue_ns, slowest_fetch_ns, slowest_install_ns;
	uint64_t overtaken; /* faults whose page the stream brought before the handler looked: not in `count`
	                     */
	uint64_t buckets_used;
	struct umm_receiver_bucket buckets[UMM_HISTOGRAM_BUCKETS]; /* those that are not empty */
};

int umm_receiver_create(unsigned idle_ms, struct umm_receiver **ret);
/* Stop, wait for the threads to end (what is missing has failed then), and unmap the memory. */
int umm_receiver_leave(struct umm_receiver *receiver);
/* Leaves, if that was not done. */
void umm_receiver_destroy(struct umm_receiver *receiver);
void umm_receiver_stop(struct umm_receiver *receiver);
/* Take a connected stream socket over (in every case): the first one becomes DATA, the second URGENT. The
 * first tells the size: more than `max_bytes` is -EMSGSIZE before anything is allocated. */
int umm_receiver_connect(struct umm_receiver *receiver, int fd, uint64_t max_bytes);
/* Receive until the switch. *state: the state of the work, as long as the receiver lives. */
int umm_receiver_precopy(struct umm_receiver *receiver, const char **state, uint32_t *len);
/* Make the memory a region, start the threads. Subscribers of the memory are told UMM_REASON_SWITCH around
 * the first, as old versions of missing pages go, and then, once, of the new backing. */
int umm_receiver_enter(struct umm_receiver *receiver);
/* Tell the source that the work goes on here. */
int umm_receiver_running(struct umm_receiver *receiver);
/* Around accesses to the memory, in the accessing thread: between the two, a page that never arrived reads as
 * a fill byte; *lost: how many such pages were met. See umm_guard_enter in pager/pager.h. */
int umm_receiver_guard_enter(struct umm_receiver *receiver);
int umm_receiver_guard_leave(struct umm_receiver *receiver, uint64_t *lost);
/* Wait until every page arrived and was verified: 0, -ETIMEDOUT after timeout_ms, or the threads' error. */
int umm_receiver_await_complete(struct umm_receiver *receiver, unsigned timeout_ms);
/* Send the result of the work, wait for the source's verdict. */
int umm_receiver_finish(struct umm_receiver *receiver, const char *text, uint32_t len, const char **verdict,
        uint32_t *verdict_len);
int umm_receiver_alive(struct umm_receiver *receiver);
void umm_receiver_abort(struct umm_receiver *receiver, const char *text);
uint64_t umm_receiver_address(struct umm_receiver *receiver);
uint64_t umm_receiver_size(struct umm_receiver *receiver);
void umm_receiver_stats(struct umm_receiver *receiver, struct umm_receiver_stats *ret);
/* All zero before enter. */
int umm_receiver_faults(struct umm_receiver *receiver, struct umm_receiver_faults *ret);
const char *umm_receiver_error(struct umm_receiver *receiver);
/* One byte per page, enum umm_page_state (sender.h); lives as long as the receiver. */
const uint8_t *umm_receiver_states(struct umm_receiver *receiver);

#endif
