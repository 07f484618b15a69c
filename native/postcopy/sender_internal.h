/* What the files of the sender share: sender.c until the switch, sender_serve.c after it. */
#ifndef UMM_POSTCOPY_SENDER_INTERNAL_H
#define UMM_POSTCOPY_SENDER_INTERNAL_H

#include <pthread.h>

#include "postcopy/bitmap.h"
#include "postcopy/channel.h"
#include "postcopy/sender.h"
#include "postcopy/tracker.h"

/* Frames are put together here, so that scattered pages do not cost a system call each. */
struct umm_outbox {
	struct umm_channel *channel;
	uint8_t *bytes;
	uint8_t *copies; /* of the pages of one frame */
	uint64_t used, room;
};

struct umm_sender {
	struct umm_tracker tracker;
	struct umm_channel data, urgent;
	struct umm_outbox bulk_out, urgent_out;
	uint8_t *memory; /* the caller's */
	uint64_t pages;
	uint32_t page_size, max_pages;
	uint64_t session, zero_digest;
	int stopfd, wakefd; /* eventfds: end every wait; look at urgent_done */
	_Atomic bool urgent_done;
	unsigned idle_ms;
	uint8_t *missing;      /* bitmap: of the switch; does not change afterwards */
	uint8_t *served;       /* bitmap: sent after the switch, on either connection */
	uint8_t *states;       /* enum umm_page_state */
	_Atomic uint64_t hint; /* the page after the last one that was asked for */
	_Atomic uint64_t requests, bulk_pages, urgent_pages;
	_Atomic int urgent_error;
	_Atomic int phase;
	uint64_t stopped_ns, missing_pages;
	struct umm_sender_stats stats; /* the driving thread's part */
	char text[UMM_FRAME_MAX_TEXT + 1];
	char error[256];
};

int umm_outbox_init(struct umm_outbox *out, struct umm_channel *channel, uint32_t page_size);
void umm_outbox_deinit(struct umm_outbox *out);
int umm_outbox_flush(struct umm_outbox *out);
/* Add pages [first, first + count) as PAGES frames, zero runs as ZERO ones. The content may change
 * meanwhile: what is sent is a copy, and its digest fits the copy. *zero (may be NULL) is added to. */
int umm_sender_add_pages(struct umm_sender *sender, struct umm_outbox *out, uint64_t first, uint64_t count);
bool umm_page_is_zero(const void *page, uint32_t page_size);
void umm_sender_set_phase(struct umm_sender *sender, int phase);
/* After a connection was lost: the peer may have said why. */
void umm_sender_last_words(struct umm_sender *sender);
/* Keeps the words of a channel's error; returns `error`. */
int umm_sender_failed(struct umm_sender *sender, struct umm_channel *channel, int error);

static inline void umm_sender_set_state(struct umm_sender *sender, uint64_t page, uint8_t state)
{
	__atomic_store_n(&sender->states[page], state, __ATOMIC_RELAXED);
}

#endif
