/* The destination's side of a migration: memory that fills up, and that is used before it is full.
 *
 * One thread drives it: create, connect (DATA, then URGENT), precopy, enter, running, then await_complete
 * and finish, while other threads use the memory. After enter the memory is a region of the pager whose
 * missing pages come from here; two threads of this file receive them. When a connection is lost, the
 * pages that did not arrive fail: their readers get SIGBUS. */
#ifndef UMM_POSTCOPY_RECEIVER_H
#define UMM_POSTCOPY_RECEIVER_H

#include <stdint.h>

struct umm_receiver;
struct umm_pager;
struct umm_region;

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

int umm_receiver_create(unsigned idle_ms, struct umm_receiver **ret);
/* After stop: wait for the threads to end; what is missing has failed then, and the region can be closed. */
void umm_receiver_join(struct umm_receiver *receiver);
/* Stops and joins. The region, if there is one, must be closed before; without one the memory is unmapped. */
void umm_receiver_destroy(struct umm_receiver *receiver);
void umm_receiver_stop(struct umm_receiver *receiver);
/* Take a connected stream socket over (in every case): the first one becomes DATA, the second URGENT. The
 * first tells the size: more than `max_bytes` is -EMSGSIZE before anything is allocated. */
int umm_receiver_connect(struct umm_receiver *receiver, int fd, uint64_t max_bytes);
/* Receive until the switch. *state: the state of the work, as long as the receiver lives. */
int umm_receiver_precopy(struct umm_receiver *receiver, const char **state, uint32_t *len);
/* Make the memory a region of `pager`, start the threads. The receiver keeps a reference to neither. */
int umm_receiver_enter(struct umm_receiver *receiver, struct umm_pager *pager, struct umm_region **ret);
/* Tell the source that the work goes on here. */
int umm_receiver_running(struct umm_receiver *receiver);
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
const char *umm_receiver_error(struct umm_receiver *receiver);
/* One byte per page, enum umm_page_state (sender.h); lives as long as the receiver. */
const uint8_t *umm_receiver_states(struct umm_receiver *receiver);

#endif
