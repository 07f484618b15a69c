#include "postcopy/receiver_internal.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "kernel/userfaultfd.h"
#include "pager/pager.h"
#include "postcopy/sender.h"

int umm_receiver_failed(struct umm_receiver *receiver, struct umm_channel *channel, int error)
{
	if (error && !receiver->text[0])
		snprintf(receiver->text, sizeof receiver->text, "%s", umm_channel_error(channel));
	return error;
}

int umm_receiver_create(unsigned idle_ms, struct umm_receiver **ret)
{
	if (!idle_ms)
		return -EINVAL;
	struct umm_receiver *receiver = calloc(1, sizeof *receiver);
	if (!receiver)
		return -ENOMEM;
	pthread_condattr_t monotonic;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&receiver->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_mutex_init(&receiver->lock, NULL);
	pthread_mutex_init(&receiver->request_lock, NULL);
	receiver->data.fd = receiver->urgent.fd = -1;
	receiver->idle_ms = idle_ms;
	receiver->page_size = (uint32_t)sysconf(_SC_PAGESIZE);
	receiver->max_pages = umm_frame_max_pages(receiver->page_size);
	receiver->stopfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	receiver->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (receiver->stopfd < 0 || receiver->wakefd < 0) {
		int error = -errno;
		umm_receiver_destroy(receiver);
		return error;
	}
	*ret = receiver;
	return 0;
}

void umm_receiver_destroy(struct umm_receiver *receiver)
{
	(void)umm_receiver_leave(receiver);
	if (receiver->data.fd >= 0)
		umm_channel_deinit(&receiver->data);
	if (receiver->urgent.fd >= 0)
		umm_channel_deinit(&receiver->urgent);
	if (receiver->stopfd >= 0)
		close(receiver->stopfd);
	if (receiver->wakefd >= 0)
		close(receiver->wakefd);
	free(receiver->missing);
	free(receiver->arrived);
	free(receiver->unsent);
	free(receiver->asked_at);
	free(receiver->sent_at);
	free(receiver->states);
	free(receiver->digests);
	free(receiver->buffers[0]);
	free(receiver->buffers[1]);
	pthread_cond_destroy(&receiver->changed);
	pthread_mutex_destroy(&receiver->lock);
	pthread_mutex_destroy(&receiver->request_lock);
	free(receiver);
}

void umm_receiver_stop(struct umm_receiver *receiver)
{
	(void)eventfd_write(receiver->stopfd, 1);
}

static int allocate(struct umm_receiver *receiver)
{
	const uint64_t size = receiver->pages * receiver->page_size;
	const uint64_t frame = (uint64_t)receiver->max_pages * receiver->page_size;
	receiver->missing = calloc(1, umm_bitmap_bytes(receiver->pages));
	receiver->arrived = calloc(1, umm_bitmap_bytes(receiver->pages));
	receiver->unsent = calloc(1, umm_bitmap_bytes(receiver->pages));
	receiver->states = calloc(1, receiver->pages);
	receiver->asked_at = calloc(receiver->pages, sizeof *receiver->asked_at);
	receiver->sent_at = calloc(receiver->pages, sizeof *receiver->sent_at);
	receiver->digests = malloc(receiver->pages * sizeof *receiver->digests);
	receiver->buffers[0] = calloc(1, frame);
	receiver->buffers[1] = calloc(1, frame);
	if (!receiver->missing || !receiver->arrived || !receiver->unsent || !receiver->states ||
	        !receiver->asked_at || !receiver->sent_at || !receiver->digests || !receiver->buffers[0] ||
	        !receiver->buffers[1])
		return -ENOMEM;
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return -errno;
	receiver->memory = memory;
	/* Single pages are taken out again at the switch, which would split every huge page. Kernels without
	 * huge pages say EINVAL, and need none of this. */
	(void)madvise(memory, size, MADV_NOHUGEPAGE);
	receiver->zero_digest = umm_page_digest(receiver->buffers[0], receiver->page_size);
	for (uint64_t page = 0; page < receiver->pages; page++)
		receiver->digests[page] = receiver->zero_digest;
	return 0;
}

static int welcome(
        struct umm_receiver *receiver, struct umm_channel *channel, int connection, uint64_t max_bytes)
{
	struct umm_hello hello = {
	        .session = htole64(receiver->session),
	        .connection = htole32((uint32_t)connection),
	        .page_size = htole32(receiver->page_size),
	};
	int error = umm_channel_send(
	        channel, &(struct umm_frame){.type = UMM_FRAME_HELLO}, &hello, sizeof hello, NULL, 0);
	struct umm_frame frame;
	if (!error)
		error = umm_channel_receive(channel, &frame);
	struct umm_welcome answer;
	if (!error)
		error = umm_channel_read_checked(channel, &frame, &answer);
	if (error)
		return error;
	const uint64_t pages = le64toh(answer.pages);
	if (le32toh(answer.page_size) != receiver->page_size)
		return umm_channel_fail(channel, -EPROTO,
		        "pages of %u bytes here and of %u bytes at the source", receiver->page_size,
		        le32toh(answer.page_size));
	if (connection == UMM_CONNECTION_URGENT)
		return le64toh(answer.session) == receiver->session && pages == receiver->pages
		               ? 0
		               : umm_channel_fail(channel, -EPROTO,
		                         "the urgent connection belongs to another migration");
	if (!pages || pages > UMM_PROTOCOL_MAX_PAGES || pages > max_bytes / receiver->page_size)
		return umm_channel_fail(channel, pages ? -EMSGSIZE : -EPROTO,
		        "the source has %llu pages of %u bytes, this side takes at most %llu bytes",
		        (unsigned long long)pages, receiver->page_size, (unsigned long long)max_bytes);
	receiver->pages = pages;
	receiver->session = le64toh(answer.session);
	error = allocate(receiver);
	return error ? umm_channel_fail(channel, error, "no memory for %llu pages of the source: %s",
	                       (unsigned long long)pages, strerror(-error))
	             : 0;
}

int umm_receiver_connect(struct umm_receiver *receiver, int fd, uint64_t max_bytes)
{
	int connection = receiver->data.fd < 0 ? UMM_CONNECTION_DATA : UMM_CONNECTION_URGENT;
	struct umm_channel *channel = connection == UMM_CONNECTION_DATA ? &receiver->data : &receiver->urgent;
	if (channel->fd >= 0) {
		close(fd);
		return -EISCONN;
	}
	int error = umm_channel_init(channel, fd, receiver->stopfd, UMM_HANDSHAKE_MS);
	if (error)
		return error;
	channel->deadline_ns = umm_now_ns() + UMM_HANDSHAKE_MS * 1000000ull;
	channel->protocol = (struct umm_protocol){
	        .side = UMM_SIDE_DESTINATION,
	        .connection = connection,
	        .phase = UMM_PHASE_HELLO,
	        .page_size = receiver->page_size,
	        .pages = receiver->pages,
	};
	error = welcome(receiver, channel, connection, max_bytes);
	if (error) {
		umm_channel_send_error(channel, error, umm_channel_error(channel));
		return umm_receiver_failed(receiver, channel, error);
	}
	channel->idle_ms = receiver->idle_ms;
	channel->deadline_ns = 0;
	channel->protocol.phase = UMM_PHASE_PRECOPY;
	channel->protocol.pages = receiver->pages;
	if (connection == UMM_CONNECTION_DATA)
		return 0;
	/* Now, not at the switch: its threads take a while to start. */
	const struct umm_pager_options options = {.uffd_source = UMM_UFFD_SOURCE_ANY};
	error = umm_pager_create(&options, &receiver->pager);
	if (error) {
		(void)umm_channel_fail(
		        channel, error, "the destination cannot start a pager: %s", strerror(-error));
		return umm_receiver_failed(receiver, channel, error);
	}
	atomic_store(&receiver->phase, UMM_PHASE_PRECOPY);
	return 0;
}

int umm_receiver_take_pages(struct umm_receiver *receiver, struct umm_channel *channel,
        const struct umm_frame *frame, uint8_t *to, uint64_t *digests)
{
	uint64_t claimed[UMM_FRAME_MAX_DATA / 512]; /* no page is smaller than 512 bytes */
	int error = umm_channel_read_checked(channel, frame, claimed);
	if (!error)
		error = umm_channel_read(channel, to, (uint64_t)frame->count * receiver->page_size);
	for (uint32_t i = 0; !error && i < frame->count; i++) {
		digests[i] = umm_page_digest(to + (uint64_t)i * receiver->page_size, receiver->page_size);
		if (digests[i] != le64toh(claimed[i]))
			error = umm_channel_fail(channel, -EBADMSG,
			        "wrong checksum of page %llu from the source",
			        (unsigned long long)(frame->first + i));
	}
	return error;
}

static int precopy_zero(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	for (uint64_t page = frame->first; page < frame->first + frame->count; page++) {
		/* what was never anything else is zero without a touch */
		if (receiver->digests[page] != receiver->zero_digest)
			memset(receiver->memory + page * receiver->page_size, 0, receiver->page_size);
		receiver->digests[page] = receiver->zero_digest;
		umm_receiver_set_state(receiver, page, UMM_PAGE_SENT);
	}
	atomic_fetch_add(&receiver->zero_pages, frame->count);
	return 0;
}

static int precopy_pages(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	if (frame->flags & UMM_FRAME_ZERO)
		return precopy_zero(receiver, frame);
	int error = umm_receiver_take_pages(receiver, &receiver->data, frame,
	        receiver->memory + frame->first * receiver->page_size, receiver->digests + frame->first);
	if (error)
		return error;
	for (uint32_t i = 0; i < frame->count; i++)
		umm_receiver_set_state(receiver, frame->first + i, UMM_PAGE_SENT);
	receiver->stats.precopy_pages += frame->count;
	return 0;
}

/* What the source never touched is not sent. Left as holes, these pages would go through the pager one by one
 * when they are first used after the switch; now they map the zero page, and a write copies it. Before Linux
 * 5.14 the advice is not known, which costs just that. */
static void populate_untouched(struct umm_receiver *receiver)
{
#ifndef MADV_POPULATE_READ
	enum { MADV_POPULATE_READ = 22 };
#endif
	const uint64_t size = receiver->page_size, pages = receiver->pages;
	for (uint64_t first = 0, end; first < pages; first = end) {
		bool untouched = receiver->states[first] == UMM_PAGE_UNTOUCHED;
		for (end = first + 1; end < pages; end++)
			if ((receiver->states[end] == UMM_PAGE_UNTOUCHED) != untouched)
				break;
		if (untouched)
			(void)madvise(
			        receiver->memory + first * size, (end - first) * size, MADV_POPULATE_READ);
	}
}

static int take_switch(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	int error = umm_channel_read_checked(&receiver->data, frame, receiver->missing);
	if (error)
		return error;
	uint64_t missing = 0;
	for (uint64_t page = 0;
	        (page = umm_bitmap_next(receiver->missing, receiver->pages, page, true)) < receiver->pages;
	        page++) {
		umm_receiver_set_state(receiver, page, UMM_PAGE_MISSING);
		missing++;
	}
	if (missing != frame->first)
		return umm_channel_fail(&receiver->data, -EPROTO,
		        "the bitmap has %llu missing pages, not %llu", (unsigned long long)missing,
		        (unsigned long long)frame->first);
	receiver->stats.missing_pages = missing;
	receiver->switch_came_at = umm_now_ns();
	return 0;
}

static int precopy_frame(struct umm_receiver *receiver, const struct umm_frame *frame)
{
	switch (frame->type) {
	case UMM_FRAME_PAGES:
		return precopy_pages(receiver, frame);
	case UMM_FRAME_ROUND:
		if (frame->first != ++receiver->stats.rounds)
			return umm_channel_fail(&receiver->data, -EPROTO, "round %llu after round %llu",
			        (unsigned long long)frame->first,
			        (unsigned long long)receiver->stats.rounds - 1);
		if (frame->first == 1)
			populate_untouched(receiver);
		return 0;
	case UMM_FRAME_STATE:
		receiver->state_len = frame->length;
		return umm_channel_read_checked(&receiver->data, frame, receiver->state);
	default:
		if (!receiver->state_len)
			return umm_channel_fail(&receiver->data, -EPROTO, "the switch came without a state");
		return take_switch(receiver, frame);
	}
}

int umm_receiver_precopy(struct umm_receiver *receiver, const char **state, uint32_t *len)
{
	if (atomic_load(&receiver->phase) != UMM_PHASE_PRECOPY)
		return -EINVAL;
	struct umm_frame frame = {0};
	int error = 0;
	while (!error && frame.type != UMM_FRAME_SWITCH) {
		error = umm_channel_receive(&receiver->data, &frame);
		if (!error)
			error = precopy_frame(receiver, &frame);
	}
	if (error) {
		if (error != -EREMOTEIO && error != -ECONNRESET)
			umm_channel_send_error(&receiver->data, error, umm_channel_error(&receiver->data));
		return umm_receiver_failed(receiver, &receiver->data, error);
	}
	*state = receiver->state;
	*len = receiver->state_len;
	return 0;
}

int umm_receiver_alive(struct umm_receiver *receiver)
{
	return umm_channel_send(
	        &receiver->data, &(struct umm_frame){.type = UMM_FRAME_ALIVE}, NULL, 0, NULL, 0);
}

void umm_receiver_abort(struct umm_receiver *receiver, const char *text)
{
	if (receiver->data.fd >= 0)
		umm_channel_send_error(&receiver->data, -ECANCELED, text);
}

uint64_t umm_receiver_address(struct umm_receiver *receiver)
{
	return (uint64_t)(uintptr_t)receiver->memory;
}

uint64_t umm_receiver_size(struct umm_receiver *receiver)
{
	return receiver->pages * receiver->page_size;
}

void umm_receiver_stats(struct umm_receiver *receiver, struct umm_receiver_stats *ret)
{
	pthread_mutex_lock(&receiver->lock);
	*ret = receiver->stats;
	pthread_mutex_unlock(&receiver->lock);
	ret->pages_total = receiver->pages;
	ret->page_size = receiver->page_size;
	ret->bytes_received = atomic_load(&receiver->data.bytes_in) + atomic_load(&receiver->urgent.bytes_in);
	ret->zero_pages = atomic_load(&receiver->zero_pages);
	ret->arrived_pages = atomic_load(&receiver->installed);
	ret->urgent_pages = atomic_load(&receiver->urgent_pages);
	ret->bulk_pages = atomic_load(&receiver->bulk_pages);
	ret->duplicate_pages = atomic_load(&receiver->duplicates);
	ret->lost_pages = atomic_load(&receiver->lost);
	ret->requests = atomic_load(&receiver->requests);
	ret->entered_ns = receiver->running_at;
	ret->switch_ns = receiver->running_at ? receiver->running_at - receiver->switch_came_at : 0;
	uint64_t last = atomic_load(&receiver->last_page_at);
	ret->last_page_ns = last && receiver->running_at ? last - receiver->running_at : 0;
	ret->phase = (uint32_t)atomic_load(&receiver->phase);
	ret->error = atomic_load(&receiver->error);
}

const char *umm_receiver_error(struct umm_receiver *receiver)
{
	return receiver->text;
}

const uint8_t *umm_receiver_states(struct umm_receiver *receiver)
{
	return receiver->states;
}
