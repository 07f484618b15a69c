/* The source's side of a migration: rounds of precopy, the switch, then serving what is missing.
 *
 * One thread drives it, in this order: create, accept (DATA, then URGENT), round..., switch, serve,
 * finish. Stop may be called from any thread: every wait then ends with -ECANCELED. The memory belongs to
 * the caller, who must not write to it between switch and the end of serve (the switch protects nothing). */
#ifndef UMM_POSTCOPY_SENDER_H
#define UMM_POSTCOPY_SENDER_H

#include <stdint.h>

#include "common/histogram.h"

struct umm_sender;

struct umm_sender_stats {
	uint64_t pages_total, page_size;
	uint64_t bytes_sent; /* on both connections, frames included */
	uint64_t rounds;
	uint64_t precopy_pages;            /* sent in rounds, pages sent again included */
	uint64_t zero_pages;               /* of the frozen content; 0 before serve ended */
	uint64_t missing_pages;            /* at the switch */
	uint64_t bulk_pages, urgent_pages; /* sent after the switch */
	uint64_t requests;                 /* frames of the destination */
	uint64_t round_pages, round_ns;    /* of the last round */
	uint64_t stop_ns;                  /* from the caller's stop of the work to SWITCH sent */
	uint64_t downtime_ns;              /* from the caller's stop of the work to the arrival of RUNNING */
	uint64_t verified, mismatched;     /* what the destination counted */
	uint32_t phase;                    /* enum umm_phase */
	uint32_t connected;                /* connections accepted */
};

/* `size` bytes of private anonymous memory at `address`, page aligned. -EOPNOTSUPP: see tracker.h. */
int umm_sender_create(uint64_t address, uint64_t size, unsigned idle_ms, struct umm_sender **ret);
void umm_sender_destroy(struct umm_sender *sender);
void umm_sender_stop(struct umm_sender *sender);
/* Take a connected stream socket over (in every case) and do its handshake: the first one becomes DATA, the
 * second URGENT. After an error the socket is closed and another one may be tried. */
int umm_sender_accept(struct umm_sender *sender, int fd);
/* Send every page that was written since the last round. */
int umm_sender_round(struct umm_sender *sender);
/* Pages that a round would send now. */
int umm_sender_dirty(struct umm_sender *sender, uint64_t *ret);
/* Hand over: the work stopped at `stopped_ns` (monotonic clock). Sends `state` and the missing pages' bitmap.
 * Subscribers of the memory are told UMM_REASON_SWITCH around it, once; the end has the error when it failed,
 * and the memory is this machine's as before. */
int umm_sender_switch(struct umm_sender *sender, uint64_t stopped_ns, const char *state, uint32_t len);
/* Serve requests and the background stream, then send the digests; returns when RESULT came. Gives
 * background pages at most `bulk_bytes_per_s` (0: no limit). */
int umm_sender_serve(struct umm_sender *sender, uint64_t bulk_bytes_per_s);
/* Wait for FINISH; its text, as long as the sender lives, goes to *text. */
int umm_sender_await_finish(struct umm_sender *sender, const char **text, uint32_t *len);
int umm_sender_alive(struct umm_sender *sender);
int umm_sender_verdict(struct umm_sender *sender, const char *text, uint32_t len);
/* Tell the destination that this side gives up, and why. */
void umm_sender_abort(struct umm_sender *sender, const char *text);
void umm_sender_stats(struct umm_sender *sender, struct umm_sender_stats *ret);
/* What went wrong last, in words; "" when nothing did. */
const char *umm_sender_error(struct umm_sender *sender);
/* One byte per page, enum umm_page_state; lives as long as the sender. */
const uint8_t *umm_sender_states(struct umm_sender *sender);

/* Where a page is. The receiver has the same states. */
enum umm_page_state {
	UMM_PAGE_UNTOUCHED, /* never written: zero, needs no sending */
	UMM_PAGE_SENT,      /* precopied */
	UMM_PAGE_MISSING,   /* written after it was sent; to come */
	UMM_PAGE_URGENT,    /* came because it was asked for */
	UMM_PAGE_BULK,      /* came with the background stream */
	UMM_PAGE_LOST,
	UMM_PAGE_STATES,
};

#endif
