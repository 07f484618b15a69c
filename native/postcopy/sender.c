#include "postcopy/sender_internal.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "common/clock.h"
#include "notifier/notifier.h"

int umm_sender_failed(struct umm_sender *sender, struct umm_channel *channel, int error)
{
	if (error && !sender->error[0])
		snprintf(sender->error, sizeof sender->error, "%s", umm_channel_error(channel));
	return error;
}

void umm_sender_set_phase(struct umm_sender *sender, int phase)
{
	atomic_store(&sender->phase, phase);
	sender->data.protocol.phase = phase;
}

int umm_sender_create(uint64_t address, uint64_t size, unsigned idle_ms, struct umm_sender **ret)
{
	const uint64_t page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	if (!address || !size || address % page_size || size % page_size || !idle_ms ||
	        size / page_size > UMM_PROTOCOL_MAX_PAGES)
		return -EINVAL;
	struct umm_sender *sender = calloc(1, sizeof *sender);
	if (!sender)
		return -ENOMEM;
	sender->tracker.uffd = sender->tracker.pagemap = sender->data.fd = sender->urgent.fd = -1;
	sender->wakefd = -1;
	sender->memory = (uint8_t *)(uintptr_t)address;
	sender->pages = size / page_size;
	sender->page_size = (uint32_t)page_size;
	sender->max_pages = umm_frame_max_pages(sender->page_size);
	sender->idle_ms = idle_ms;
	sender->hint = UINT64_MAX;
	sender->stopfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	sender->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int error = sender->stopfd < 0 || sender->wakefd < 0 ? -errno : 0;
	if (!error && getrandom(&sender->session, sizeof sender->session, 0) != sizeof sender->session)
		error = -EIO;
	sender->missing = calloc(1, umm_bitmap_bytes(sender->pages));
	sender->served = calloc(1, umm_bitmap_bytes(sender->pages));
	sender->states = calloc(1, sender->pages);
	void *zero = calloc(1, page_size);
	if (!sender->missing || !sender->served || !sender->states || !zero)
		error = -ENOMEM;
	else
		sender->zero_digest = umm_page_digest(zero, sender->page_size);
	free(zero);
	if (!error)
		error = umm_outbox_init(&sender->bulk_out, &sender->data, sender->page_size);
	if (!error)
		error = umm_outbox_init(&sender->urgent_out, &sender->urgent, sender->page_size);
	if (!error)
		error = umm_tracker_init(&sender->tracker, address, size);
	if (error) {
		umm_sender_destroy(sender);
		return error;
	}
	*ret = sender;
	return 0;
}

void umm_sender_destroy(struct umm_sender *sender)
{
	umm_tracker_deinit(&sender->tracker);
	/* a channel that was never opened holds nothing */
	if (sender->data.fd >= 0)
		umm_channel_deinit(&sender->data);
	if (sender->urgent.fd >= 0)
		umm_channel_deinit(&sender->urgent);
	if (sender->stopfd >= 0)
		close(sender->stopfd);
	if (sender->wakefd >= 0)
		close(sender->wakefd);
	umm_outbox_deinit(&sender->bulk_out);
	umm_outbox_deinit(&sender->urgent_out);
	free(sender->missing);
	free(sender->served);
	free(sender->states);
	free(sender);
}

void umm_sender_stop(struct umm_sender *sender)
{
	(void)eventfd_write(sender->stopfd, 1);
}

static int handshake(struct umm_sender *sender, struct umm_channel *channel, int connection)
{
	struct umm_frame frame;
	int error = umm_channel_receive(channel, &frame);
	if (error)
		return error;
	struct umm_hello hello;
	error = umm_channel_read_checked(channel, &frame, &hello);
	if (error)
		return error;
	if (le32toh(hello.connection) != (uint32_t)connection ||
	        (connection == UMM_CONNECTION_URGENT && le64toh(hello.session) != sender->session))
		return umm_channel_fail(channel, -EPROTO, "a connection of another migration");
	if (le32toh(hello.page_size) != sender->page_size)
		return umm_channel_fail(channel, -EPROTO,
		        "pages of %u bytes here and of %u bytes at the destination: both hosts need the same",
		        sender->page_size, le32toh(hello.page_size));
	struct umm_welcome welcome = {
	        .session = htole64(sender->session),
	        .pages = htole64(sender->pages),
	        .page_size = htole32(sender->page_size),
	        .idle_ms = htole32(sender->idle_ms),
	};
	return umm_channel_send(
	        channel, &(struct umm_frame){.type = UMM_FRAME_WELCOME}, &welcome, sizeof welcome, NULL, 0);
}

int umm_sender_accept(struct umm_sender *sender, int fd)
{
	int connection = sender->data.fd < 0 ? UMM_CONNECTION_DATA : UMM_CONNECTION_URGENT;
	struct umm_channel *channel = connection == UMM_CONNECTION_DATA ? &sender->data : &sender->urgent;
	if (channel->fd >= 0) {
		close(fd);
		return -EISCONN;
	}
	int error = umm_channel_init(channel, fd, sender->stopfd, UMM_HANDSHAKE_MS);
	if (error)
		return error;
	channel->deadline_ns = umm_now_ns() + UMM_HANDSHAKE_MS * 1000000ull;
	channel->protocol = (struct umm_protocol){
	        .side = UMM_SIDE_SOURCE,
	        .connection = connection,
	        .phase = UMM_PHASE_HELLO,
	        .page_size = sender->page_size,
	        .pages = sender->pages,
	};
	error = handshake(sender, channel, connection);
	if (error) {
		snprintf(sender->error, sizeof sender->error, "%s", umm_channel_error(channel));
		umm_channel_send_error(channel, error, sender->error);
		umm_channel_deinit(channel);
		return error;
	}
	channel->idle_ms = sender->idle_ms;
	channel->deadline_ns = 0;
	channel->protocol.phase = UMM_PHASE_PRECOPY;
	sender->error[0] = 0;
	sender->stats.connected++;
	if (connection == UMM_CONNECTION_URGENT)
		umm_sender_set_phase(sender, UMM_PHASE_PRECOPY);
	return 0;
}

static int send_range(void *context, uint64_t first, uint64_t count)
{
	struct umm_sender *sender = context;
	sender->stats.round_pages += count;
	memset(sender->states + first, UMM_PAGE_SENT, count);
	return umm_sender_add_pages(sender, &sender->bulk_out, first, count);
}

/* The destination says nothing during precopy, unless it gives up: better its words than a broken pipe. */
static int heed_peer(struct umm_sender *sender)
{
	int ready = umm_channel_wait(&sender->data, 0, -1);
	if (ready <= 0)
		return ready;
	struct umm_frame frame;
	int error = umm_channel_receive(&sender->data, &frame);
	return error ? error
	             : umm_channel_fail(&sender->data, -EPROTO, "the destination spoke before the switch");
}

void umm_sender_last_words(struct umm_sender *sender)
{
	struct umm_frame frame;
	while (umm_channel_wait(&sender->data, 0, -1) > 0 && umm_channel_receive(&sender->data, &frame) == 0)
		;
}

int umm_sender_round(struct umm_sender *sender)
{
	if (atomic_load(&sender->phase) != UMM_PHASE_PRECOPY)
		return -EINVAL;
	uint64_t start = umm_now_ns();
	sender->stats.round_pages = 0;
	int error = heed_peer(sender);
	if (!error)
		error = umm_tracker_scan(&sender->tracker, 1, send_range, sender);
	if (!error)
		error = umm_outbox_flush(&sender->bulk_out);
	if (!error) {
		sender->stats.rounds++;
		error = umm_channel_send(&sender->data,
		        &(struct umm_frame){.type = UMM_FRAME_ROUND, .first = sender->stats.rounds}, NULL, 0,
		        NULL, 0);
	}
	if (error == -ECONNRESET)
		umm_sender_last_words(sender);
	sender->stats.precopy_pages += sender->stats.round_pages;
	sender->stats.round_ns = umm_now_ns() - start;
	return umm_sender_failed(sender, &sender->data, error);
}

static int count_range(void *context, uint64_t first, uint64_t count)
{
	(void)first;
	*(uint64_t *)context += count;
	return 0;
}

int umm_sender_dirty(struct umm_sender *sender, uint64_t *ret)
{
	*ret = 0;
	return umm_tracker_scan(&sender->tracker, 0, count_range, ret);
}

static int mark_missing(void *context, uint64_t first, uint64_t count)
{
	struct umm_sender *sender = context;
	for (uint64_t page = first; page < first + count; page++)
		(void)umm_bitmap_test_and_set(sender->missing, page);
	memset(sender->states + first, UMM_PAGE_MISSING, count);
	sender->missing_pages += count;
	return 0;
}

static int switch_over(struct umm_sender *sender, const char *state, uint32_t len)
{
	int error = heed_peer(sender);
	if (!error)
		error = umm_tracker_scan(&sender->tracker, 0, mark_missing, sender);
	if (!error)
		error = umm_channel_send(
		        &sender->data, &(struct umm_frame){.type = UMM_FRAME_STATE}, state, len, NULL, 0);
	if (!error) {
		/* RUNNING may be there before send returns. */
		umm_sender_set_phase(sender, UMM_PHASE_POSTCOPY);
		sender->urgent.protocol.phase = UMM_PHASE_POSTCOPY;
		error = umm_channel_send(&sender->data,
		        &(struct umm_frame){.type = UMM_FRAME_SWITCH, .first = sender->missing_pages},
		        sender->missing, (uint32_t)umm_bitmap_bytes(sender->pages), NULL, 0);
	}
	return error;
}

int umm_sender_switch(struct umm_sender *sender, uint64_t stopped_ns, const char *state, uint32_t len)
{
	if (atomic_load(&sender->phase) != UMM_PHASE_PRECOPY || len > UMM_FRAME_MAX_TEXT)
		return -EINVAL;
	sender->stopped_ns = stopped_ns;
	/* Whoever reaches the memory past this process's page tables (a device, another MMU) stops before the
	 * last scan: what it wrote later would stay behind. */
	const uint64_t start = (uintptr_t)sender->memory;
	struct umm_notify_range range;
	(void)umm_notify_start(&range, umm_space_self(), start, start + sender->pages * sender->page_size,
	        UMM_SOURCE_POSTCOPY, UMM_REASON_SWITCH, UMM_NOTIFY_BLOCKABLE);
	int error = switch_over(sender, state, len);
	umm_notify_end(&range, error);
	sender->stats.stop_ns = umm_now_ns() - stopped_ns;
	return umm_sender_failed(sender, &sender->data, error);
}

void umm_sender_abort(struct umm_sender *sender, const char *text)
{
	if (sender->data.fd >= 0)
		umm_channel_send_error(&sender->data, -ECANCELED, text);
}

void umm_sender_stats(struct umm_sender *sender, struct umm_sender_stats *ret)
{
	*ret = sender->stats;
	ret->pages_total = sender->pages;
	ret->page_size = sender->page_size;
	ret->bytes_sent = atomic_load(&sender->data.bytes_out) + atomic_load(&sender->urgent.bytes_out);
	ret->missing_pages = sender->missing_pages;
	ret->bulk_pages = atomic_load(&sender->bulk_pages);
	ret->urgent_pages = atomic_load(&sender->urgent_pages);
	ret->requests = atomic_load(&sender->requests);
	ret->phase = (uint32_t)atomic_load(&sender->phase);
}

const char *umm_sender_error(struct umm_sender *sender)
{
	return sender->error;
}

const uint8_t *umm_sender_states(struct umm_sender *sender)
{
	return sender->states;
}
