/* The source after the switch: one thread answers requests, another streams the rest behind them. */
#include "postcopy/sender_internal.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "common/clock.h"
#include "postcopy/thread.h"

enum {
	/* The stream starts where the first fault is; without any fault it starts after this. */
	FIRST_FAULT_MS = 500,
	/* Small, so that the stream soon turns to where the faults are. */
	BULK_BYTES = 128 << 10,
};

static int answer(struct umm_sender *sender, const struct umm_frame *request)
{
	const uint64_t end = request->first + request->count;
	atomic_fetch_add(&sender->requests, 1);
	/* Pages that are on their way in the stream are sent once more: the stream's queue may be long. */
	for (uint64_t page = request->first; page < end; page++) {
		(void)umm_bitmap_test_and_set(sender->served, page);
		umm_sender_set_state(sender, page, UMM_PAGE_URGENT);
	}
	atomic_store(&sender->hint, end);
	int error = umm_sender_add_pages(sender, &sender->urgent_out, request->first, request->count);
	atomic_fetch_add(&sender->urgent_pages, request->count);
	return error ? error : umm_outbox_flush(&sender->urgent_out);
}

static void *urgent_main(void *context)
{
	struct umm_sender *sender = context;
	int error = 0;
	while (!error && !atomic_load(&sender->urgent_done)) {
		/* No limit: no faults is no fault. Whether the peer lives is seen on DATA. */
		int ready = umm_channel_wait(&sender->urgent, -1, sender->wakefd);
		if (ready == 0)
			continue;
		struct umm_frame frame;
		error = ready < 0 ? ready : umm_channel_receive(&sender->urgent, &frame);
		if (!error)
			error = answer(sender, &frame);
	}
	atomic_store(&sender->urgent_error, error);
	return NULL;
}

/* A frame of the destination on DATA; ALIVE ones are skipped. *came is 0 when none came in time. */
static int next_frame(struct umm_sender *sender, int timeout_ms, struct umm_frame *frame, int *came)
{
	*came = 0;
	for (;;) {
		int ready = umm_channel_wait(&sender->data, timeout_ms, -1);
		if (ready <= 0)
			return ready;
		int error = umm_channel_receive(&sender->data, frame);
		if (error)
			return error;
		if (frame->type != UMM_FRAME_ALIVE) {
			*came = 1;
			return 0;
		}
	}
}

/* Wait for one frame of `type`, no longer than the idle timeout without a sign of life. */
static int await_frame(struct umm_sender *sender, int type, struct umm_frame *frame)
{
	for (;;) {
		int error = umm_channel_receive(&sender->data, frame);
		if (error)
			return error;
		if (frame->type == type)
			return 0;
		if (frame->type != UMM_FRAME_ALIVE)
			return umm_channel_fail(&sender->data, -EPROTO,
			        "%s instead of %s from the destination", umm_frame_name(frame->type),
			        umm_frame_name(type));
	}
}

static int await_running(struct umm_sender *sender)
{
	struct umm_frame frame;
	int error = await_frame(sender, UMM_FRAME_RUNNING, &frame);
	if (!error)
		sender->stats.downtime_ns = umm_now_ns() - sender->stopped_ns;
	return error;
}

/* The next run of pages that nobody sent yet: after the last fault, else after the previous run. */
static uint64_t next_run(struct umm_sender *sender, uint64_t *cursor, uint64_t most)
{
	uint64_t hint = atomic_exchange(&sender->hint, UINT64_MAX);
	if (hint < sender->pages)
		*cursor = hint;
	for (int turn = 0; turn < 2; turn++) {
		uint64_t page = *cursor;
		while ((page = umm_bitmap_next(sender->missing, sender->pages, page, true)) < sender->pages) {
			uint64_t run = 0;
			while (run < most && page + run < sender->pages &&
			        umm_bitmap_test(sender->missing, page + run) &&
			        !umm_bitmap_test_and_set(sender->served, page + run)) {
				umm_sender_set_state(sender, page + run, UMM_PAGE_BULK);
				run++;
			}
			*cursor = page;
			if (run)
				return run;
			page++;
		}
		*cursor = 0;
	}
	return 0;
}

static int wait_for_first_fault(struct umm_sender *sender)
{
	uint64_t until = umm_now_ns() + FIRST_FAULT_MS * 1000000ull;
	while (atomic_load(&sender->hint) == UINT64_MAX && umm_now_ns() < until) {
		int error = atomic_load(&sender->urgent_error);
		if (error)
			return error;
		nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
	}
	return 0;
}

static int stream(struct umm_sender *sender, uint64_t bytes_per_s)
{
	int error = wait_for_first_fault(sender);
	uint64_t most = BULK_BYTES / sender->page_size, cursor = 0, run, start = umm_now_ns();
	if (!most)
		most = 1;
	while (!error && (run = next_run(sender, &cursor, most))) {
		error = umm_sender_add_pages(sender, &sender->bulk_out, cursor, run);
		cursor += run;
		/* No batching beyond this: the stream is to be where the last fault was. */
		if (!error)
			error = umm_outbox_flush(&sender->bulk_out);
		uint64_t sent = atomic_fetch_add(&sender->bulk_pages, run) + run;
		while (!error && bytes_per_s &&
		        (double)sent * sender->page_size / (double)bytes_per_s >
		                (double)(umm_now_ns() - start) / 1e9) {
			struct umm_frame frame;
			int came;
			error = next_frame(sender, 1, &frame, &came);
			if (!error && came)
				error = umm_channel_fail(&sender->data, -EPROTO, "%s during the stream",
				        umm_frame_name(frame.type));
		}
		if (!error)
			error = atomic_load(&sender->urgent_error);
	}
	return error ? error
	             : umm_channel_send(&sender->data, &(struct umm_frame){.type = UMM_FRAME_STREAMED}, NULL,
	                       0, NULL, 0);
}

struct stream_job {
	struct umm_sender *sender;
	uint64_t bytes_per_s;
	int error;
};

static void *stream_main(void *context)
{
	struct stream_job *job = context;
	umm_thread_give_way();
	job->error = stream(job->sender, job->bytes_per_s);
	return NULL;
}

/* A thread of its own, because the caller could not take its lower priority back. */
static int stream_in_thread(struct umm_sender *sender, uint64_t bytes_per_s)
{
	struct stream_job job = {.sender = sender, .bytes_per_s = bytes_per_s};
	pthread_t thread;
	int error = umm_thread_start(&thread, stream_main, &job);
	if (error)
		return error;
	pthread_join(thread, NULL);
	return job.error;
}

/* All of the frozen content is read once more: a write that the tracker had missed would show here as a
 * page that differs at the destination. */
static int send_digests(struct umm_sender *sender)
{
	uint64_t *digests = malloc(UMM_FRAME_MAX_DIGESTS * sizeof *digests);
	int error = digests ? 0 : -ENOMEM;
	uint64_t zeros = 0;
	for (uint64_t first = 0; !error && first < sender->pages; first += UMM_FRAME_MAX_DIGESTS) {
		uint64_t count = sender->pages - first;
		if (count > UMM_FRAME_MAX_DIGESTS)
			count = UMM_FRAME_MAX_DIGESTS;
		for (uint64_t i = 0; i < count; i++) {
			const uint8_t *page = sender->memory + (first + i) * sender->page_size;
			bool zero = umm_page_is_zero(page, sender->page_size);
			digests[i] = htole64(
			        zero ? sender->zero_digest : umm_page_digest(page, sender->page_size));
			zeros += zero;
		}
		error = umm_channel_send(&sender->data,
		        &(struct umm_frame){
		                .type = UMM_FRAME_DIGESTS, .first = first, .count = (uint32_t)count},
		        digests, (uint32_t)(count * 8), NULL, 0);
	}
	free(digests);
	sender->stats.zero_pages = zeros;
	return error;
}

static int await_result(struct umm_sender *sender)
{
	struct umm_frame frame;
	uint64_t counts[2];
	int error = await_frame(sender, UMM_FRAME_RESULT, &frame);
	if (!error)
		error = umm_channel_read_checked(&sender->data, &frame, counts);
	if (error)
		return error;
	sender->stats.verified = le64toh(counts[0]);
	sender->stats.mismatched = le64toh(counts[1]);
	if (sender->stats.verified + sender->stats.mismatched != sender->pages)
		return umm_channel_fail(
		        &sender->data, -EPROTO, "the destination verified another number of pages");
	return 0;
}

int umm_sender_serve(struct umm_sender *sender, uint64_t bulk_bytes_per_s)
{
	if (atomic_load(&sender->phase) != UMM_PHASE_POSTCOPY)
		return -EINVAL;
	pthread_t urgent;
	int error = umm_thread_start(&urgent, urgent_main, sender);
	if (error)
		return error;
	error = await_running(sender);
	if (!error)
		error = stream_in_thread(sender, bulk_bytes_per_s);
	if (!error) {
		umm_sender_set_phase(sender, UMM_PHASE_VERIFY);
		error = send_digests(sender);
	}
	if (!error)
		error = await_result(sender);
	if (error == -ECONNRESET)
		umm_sender_last_words(sender);
	int urgent_error = atomic_load(&sender->urgent_error);
	atomic_store(&sender->urgent_done, true);
	(void)eventfd_write(sender->wakefd, 1);
	pthread_join(urgent, NULL);
	if (!error)
		umm_sender_set_phase(sender, UMM_PHASE_FINISH);
	return urgent_error && error == urgent_error ? umm_sender_failed(sender, &sender->urgent, error)
	                                             : umm_sender_failed(sender, &sender->data, error);
}

int umm_sender_await_finish(struct umm_sender *sender, const char **text, uint32_t *len)
{
	if (atomic_load(&sender->phase) != UMM_PHASE_FINISH)
		return -EINVAL;
	struct umm_frame frame;
	int error = await_frame(sender, UMM_FRAME_FINISH, &frame);
	if (!error)
		error = umm_channel_read_checked(&sender->data, &frame, sender->text);
	if (!error) {
		sender->text[frame.length] = 0;
		*text = sender->text;
		*len = frame.length;
	}
	return umm_sender_failed(sender, &sender->data, error);
}

int umm_sender_alive(struct umm_sender *sender)
{
	/* From another thread than the driving one: what went wrong is that one's to find and to tell. */
	return umm_channel_send(
	        &sender->data, &(struct umm_frame){.type = UMM_FRAME_ALIVE}, NULL, 0, NULL, 0);
}

int umm_sender_verdict(struct umm_sender *sender, const char *text, uint32_t len)
{
	if (atomic_load(&sender->phase) != UMM_PHASE_FINISH || len > UMM_FRAME_MAX_TEXT)
		return -EINVAL;
	int error = umm_channel_send(
	        &sender->data, &(struct umm_frame){.type = UMM_FRAME_VERDICT}, text, len, NULL, 0);
	if (!error)
		umm_sender_set_phase(sender, UMM_PHASE_DONE);
	return umm_sender_failed(sender, &sender->data, error);
}
