/* The destination after the switch: the two threads that receive. receiver_enter.c starts them. */
#include "postcopy/receiver_internal.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "common/clock.h"
#include "pager/pager.h"
#include "postcopy/sender.h"
#include "postcopy/thread.h"

static void signal_change(struct umm_receiver *receiver)
{
	pthread_mutex_lock(&receiver->lock);
	pthread_cond_broadcast(&receiver->changed);
	pthread_mutex_unlock(&receiver->lock);
}

static void leave(struct umm_receiver *receiver)
{
	atomic_store(&receiver->leaving, true);
	(void)eventfd_write(receiver->wakefd, 1);
	signal_change(receiver);
}

/* The next run of pages in [*first, end) that nobody has delivered; they are the caller's from here on. */
static uint64_t claim(struct umm_receiver *receiver, uint64_t *first, uint64_t end)
{
	while (*first < end && umm_bitmap_test_and_set(receiver->arrived, *first)) {
		atomic_fetch_add(&receiver->duplicates, 1);
		(*first)++;
	}
	uint64_t run = *first < end;
	while (run && *first + run < end && !umm_bitmap_test_and_set(receiver->arrived, *first + run))
		run++;
	return run;
}

/* Pages that somebody may have waited for were received at `came` and are installed now. */
static void record_waits(struct umm_receiver *receiver, uint64_t first, uint64_t count, uint64_t came)
{
	const uint64_t now = umm_now_ns();
	for (uint64_t page = first; page < first + count; page++) {
		uint64_t asked = __atomic_load_n(&receiver->asked_at[page], __ATOMIC_ACQUIRE);
		uint64_t sent = __atomic_load_n(&receiver->sent_at[page], __ATOMIC_RELAXED);
		if (!asked || asked > now)
			continue;
		umm_histogram_record(&receiver->latency, now - asked);
		/* The stream may have been faster than the request, or than its sending. */
		if (sent < asked || sent > came)
			sent = asked > came ? asked : came;
		pthread_mutex_lock(&receiver->lock);
		if (now - asked > receiver->slowest_ns) {
			receiver->slowest_ns = now - asked;
			receiver->slowest_queue_ns = sent - asked;
			receiver->slowest_fetch_ns = came > sent ? came - sent : 0;
		}
		pthread_mutex_unlock(&receiver->lock);
	}
}

/* Give pages to the region. data NULL: zeros, and digests NULL. */
static int arrive(struct umm_receiver *receiver, struct umm_channel *channel, const struct umm_frame *frame,
        const uint8_t *data, const uint64_t *digests)
{
	const uint64_t size = receiver->page_size, end = frame->first + frame->count;
	const bool urgent = channel == &receiver->urgent;
	uint64_t first = frame->first, run, came = umm_now_ns();
	while ((run = claim(receiver, &first, end))) {
		for (uint64_t page = first; page < first + run; page++) {
			receiver->digests[page] =
			        digests ? digests[page - frame->first] : receiver->zero_digest;
			umm_receiver_set_state(receiver, page, urgent ? UMM_PAGE_URGENT : UMM_PAGE_BULK);
		}
		uint64_t installed;
		int error = umm_region_deliver(receiver->region, first * size, run * size,
		        data ? data + (first - frame->first) * size : NULL, &installed);
		if (error) {
			(void)umm_region_fail(receiver->region, first * size, run * size, error);
			return umm_channel_fail(channel, error, "cannot install page %llu: %s",
			        (unsigned long long)first, strerror(-error));
		}
		record_waits(receiver, first, run, came);
		atomic_fetch_add(urgent ? &receiver->urgent_pages : &receiver->bulk_pages, run);
		if (!data)
			atomic_fetch_add(&receiver->zero_pages, run);
		if (atomic_fetch_add(&receiver->installed, run) + run == receiver->stats.missing_pages) {
			atomic_store(&receiver->last_page_at, umm_now_ns());
			leave(receiver);
		}
		first += run;
	}
	return 0;
}

static int receive_pages(
        struct umm_receiver *receiver, struct umm_channel *channel, const struct umm_frame *frame)
{
	if (frame->flags & UMM_FRAME_ZERO)
		return arrive(receiver, channel, frame, NULL, NULL);
	uint8_t *buffer = receiver->buffers[channel->protocol.connection];
	uint64_t digests[UMM_FRAME_MAX_DATA / 512];
	int error = umm_receiver_take_pages(receiver, channel, frame, buffer, digests);
	return error ? error : arrive(receiver, channel, frame, buffer, digests);
}

/* Nothing more will come: whoever waits for a page learns it now. */
static void lose(struct umm_receiver *receiver, struct umm_channel *channel, int error)
{
	int none = 0;
	if (atomic_compare_exchange_strong(&receiver->error, &none, error)) {
		pthread_mutex_lock(&receiver->lock);
		umm_receiver_failed(receiver, channel, error);
		pthread_mutex_unlock(&receiver->lock);
		if (error != -EREMOTEIO && error != -ECONNRESET)
			umm_channel_send_error(&receiver->data, error, umm_channel_error(channel));
	}
	/* Before the pages fail: a request from here on is answered by its return value. */
	leave(receiver);
	for (uint64_t page = 0; (page = umm_bitmap_next(receiver->arrived, receiver->pages, page, false)) <
	                        receiver->pages;) {
		uint64_t run = claim(receiver, &page, receiver->pages);
		if (!run)
			break;
		for (uint64_t i = page; i < page + run; i++)
			umm_receiver_set_state(receiver, i, UMM_PAGE_LOST);
		atomic_fetch_add(&receiver->lost, run);
		(void)umm_region_fail(
		        receiver->region, page * receiver->page_size, run * receiver->page_size, -EIO);
		page += run;
	}
	signal_change(receiver);
}

void *umm_receiver_urgent_main(void *context)
{
	struct umm_receiver *receiver = context;
	struct umm_channel *channel = &receiver->urgent;
	int error = 0;
	while (!error && !atomic_load(&receiver->leaving)) {
		bool unsent = atomic_load(&receiver->any_unsent);
		struct pollfd fds[3] = {
		        {.fd = channel->fd, .events = (short)(POLLIN | (unsent ? POLLOUT : 0))},
		        {.fd = receiver->stopfd, .events = POLLIN},
		        {.fd = receiver->wakefd, .events = POLLIN},
		};
		bool ahead = channel->in_start < channel->in_end;
		if (!ahead && poll(fds, 3, -1) < 0)
			continue; /* EINTR; nothing else is possible with these three */
		if (fds[1].revents)
			error = umm_channel_fail(channel, -ECANCELED, "stopped");
		eventfd_t drained;
		if (fds[2].revents)
			(void)eventfd_read(receiver->wakefd, &drained);
		if (fds[0].revents & POLLOUT)
			umm_receiver_send_queued(receiver);
		struct umm_frame frame;
		if (!error && (ahead || fds[0].revents & ~POLLOUT)) {
			error = umm_channel_receive(channel, &frame);
			if (!error)
				error = receive_pages(receiver, channel, &frame);
		}
	}
	if (error && !atomic_load(&receiver->leaving)) {
		lose(receiver, channel, error);
		shutdown(receiver->data.fd, SHUT_RD); /* ends the other thread's wait */
	}
	return NULL;
}

static int await_arrivals(struct umm_receiver *receiver)
{
	const struct timespec step = {.tv_nsec = 1000000};
	uint64_t until = umm_now_ns() + receiver->idle_ms * 1000000ull;
	while (atomic_load(&receiver->installed) < receiver->stats.missing_pages) {
		int error = atomic_load(&receiver->error);
		if (error)
			return error;
		if (umm_now_ns() > until)
			return umm_channel_fail(&receiver->data, -EPROTO,
			        "the source says that every page was sent; %llu did not come",
			        (unsigned long long)(receiver->stats.missing_pages -
			                             atomic_load(&receiver->installed)));
		nanosleep(&step, NULL);
	}
	return 0;
}

static void set_phase(struct umm_receiver *receiver, int phase)
{
	receiver->data.protocol.phase = phase;
	atomic_store(&receiver->phase, phase);
}

static int complete(struct umm_receiver *receiver)
{
	uint64_t counts[2] = {htole64(receiver->stats.verified), htole64(receiver->stats.mismatched)};
	set_phase(receiver, UMM_PHASE_FINISH);
	int error = umm_channel_send(&receiver->data, &(struct umm_frame){.type = UMM_FRAME_RESULT}, counts,
	        sizeof counts, NULL, 0);
	pthread_mutex_lock(&receiver->lock);
	receiver->complete = true;
	pthread_cond_broadcast(&receiver->changed);
	pthread_mutex_unlock(&receiver->lock);
	return error;
}

/* The source's digests of its frozen content, against those of what came (the memory itself has changed
 * since, for the work goes on in it). */
static int compare_digests(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	const uint64_t seen = receiver->stats.verified + receiver->stats.mismatched;
	if (frame->first != seen)
		return umm_channel_fail(&receiver->data, -EPROTO, "digests from page %llu instead of %llu",
		        (unsigned long long)frame->first, (unsigned long long)seen);
	/* The stream is over: its buffer is free, and larger than these (UMM_FRAME_MAX_DATA). */
	uint64_t *digests = (uint64_t *)receiver->buffers[UMM_CONNECTION_DATA];
	int error = umm_channel_read_checked(&receiver->data, frame, digests);
	if (error)
		return error;
	uint64_t same = 0;
	for (uint32_t i = 0; i < frame->count; i++)
		same += le64toh(digests[i]) == receiver->digests[frame->first + i];
	pthread_mutex_lock(&receiver->lock);
	receiver->stats.verified += same;
	receiver->stats.mismatched += frame->count - same;
	pthread_mutex_unlock(&receiver->lock);
	return frame->first + frame->count == receiver->pages ? complete(receiver) : 0;
}

static int take_verdict(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	/* Without the lock: nobody looks at the text before verdict_came. */
	int error = umm_channel_read_checked(&receiver->data, frame, receiver->verdict);
	if (error)
		return error;
	receiver->verdict_len = frame->length;
	atomic_store(&receiver->verdict_came, true);
	signal_change(receiver);
	return 0;
}

static int data_frame(struct umm_receiver *receiver)
{
	struct umm_frame frame;
	/* Once everything is here, the source has nothing to say until it is told the result. */
	int ready = receiver->data.protocol.phase != UMM_PHASE_FINISH;
	while (!ready)
		ready = umm_channel_wait(&receiver->data, -1, -1);
	int error = ready < 0 ? ready : umm_channel_receive(&receiver->data, &frame);
	if (error)
		return error;
	switch (frame.type) {
	case UMM_FRAME_PAGES:
		return receive_pages(receiver, &receiver->data, &frame);
	case UMM_FRAME_STREAMED:
		error = await_arrivals(receiver);
		set_phase(receiver, UMM_PHASE_VERIFY);
		return error;
	case UMM_FRAME_DIGESTS:
		return compare_digests(receiver, &frame);
	case UMM_FRAME_VERDICT:
		return take_verdict(receiver, &frame);
	default: /* ALIVE */
		atomic_store(&receiver->last_sign_at, umm_now_ns());
		return 0;
	}
}

void *umm_receiver_data_main(void *context)
{
	struct umm_receiver *receiver = context;
	int error = 0;
	umm_thread_give_way();
	while (!error && !receiver->verdict_came)
		error = data_frame(receiver);
	if (error)
		lose(receiver, &receiver->data, error);
	return NULL;
}
