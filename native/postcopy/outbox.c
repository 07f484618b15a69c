/* Pages of the source as frames: copies of what may be written meanwhile, with their digests. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "postcopy/sender_internal.h"

enum { OUTBOX_FLUSH = 256 << 10 };

bool umm_page_is_zero(const void *page, uint32_t page_size)
{
	const uint64_t *words = page;
	return words[0] == 0 && memcmp(page, (const char *)page + 8, page_size - 8) == 0;
}

int umm_outbox_init(struct umm_outbox *out, struct umm_channel *channel, uint32_t page_size)
{
	/* one frame of the largest size always fits behind what does not yet need a flush */
	out->room =
	        OUTBOX_FLUSH + UMM_FRAME_HEADER + (uint64_t)umm_frame_max_pages(page_size) * (8 + page_size);
	out->channel = channel;
	out->bytes = malloc(out->room);
	out->copies = malloc((uint64_t)umm_frame_max_pages(page_size) * page_size);
	return out->bytes && out->copies ? 0 : -ENOMEM;
}

void umm_outbox_deinit(struct umm_outbox *out)
{
	free(out->bytes);
	free(out->copies);
}

int umm_outbox_flush(struct umm_outbox *out)
{
	int error = out->used ? umm_channel_send_raw(out->channel, out->bytes, out->used) : 0;
	out->used = 0;
	return error;
}

static int outbox_make_room(struct umm_outbox *out, uint64_t len)
{
	return out->used > OUTBOX_FLUSH || out->used + len > out->room ? umm_outbox_flush(out) : 0;
}

static int add_zero_run(struct umm_outbox *out, uint64_t first, uint64_t count)
{
	while (count) {
		struct umm_frame frame = {
		        .type = UMM_FRAME_PAGES,
		        .flags = UMM_FRAME_ZERO,
		        .first = first,
		        .count = count < UINT32_MAX ? (uint32_t)count : UINT32_MAX,
		        .payload_check = umm_frame_payload_check(NULL, 0),
		};
		int error = outbox_make_room(out, UMM_FRAME_HEADER);
		if (error)
			return error;
		umm_frame_encode(&frame, out->bytes + out->used);
		out->used += UMM_FRAME_HEADER;
		first += frame.count;
		count -= frame.count;
	}
	return 0;
}

static int add_data_run(struct umm_sender *sender, struct umm_outbox *out, uint64_t first, uint32_t count)
{
	const uint64_t size = sender->page_size;
	int error = outbox_make_room(out, UMM_FRAME_HEADER + count * (8 + size));
	if (error)
		return error;
	uint8_t *header = out->bytes + out->used, *digests = header + UMM_FRAME_HEADER;
	memcpy(digests + (uint64_t)count * 8, out->copies, count * size);
	for (uint32_t i = 0; i < count; i++) {
		uint64_t digest = htole64(umm_page_digest(out->copies + i * size, sender->page_size));
		memcpy(digests + (uint64_t)i * 8, &digest, sizeof digest);
	}
	struct umm_frame frame = {
	        .type = UMM_FRAME_PAGES,
	        .first = first,
	        .count = count,
	        .length = (uint32_t)(count * (8 + size)),
	        .payload_check = umm_frame_payload_check(digests, count * 8),
	};
	umm_frame_encode(&frame, header);
	out->used += UMM_FRAME_HEADER + frame.length;
	return 0;
}

/* Copies a page that may be written meanwhile (in a round, it is then sent again: it was protected before, so
 * the next scan reports it). What is sent and what its digest is of is the copy. Whether the copy is zero. */
static bool copy_live_page(uint8_t *to, const uint8_t *from, uint32_t page_size)
{
	uint64_t any = 0;
	for (uint32_t i = 0; i < page_size; i += 8) {
		uint64_t word = __atomic_load_n((const uint64_t *)(from + i), __ATOMIC_RELAXED);
		any |= word;
		memcpy(to + i, &word, sizeof word);
	}
	return !any;
}

int umm_sender_add_pages(struct umm_sender *sender, struct umm_outbox *out, uint64_t first, uint64_t count)
{
	const uint64_t size = sender->page_size, end = first + count;
	while (first < end) {
		uint64_t run = 0, zeros = 0;
		while (run < sender->max_pages && first + run < end && !zeros) {
			if (copy_live_page(out->copies + run * size, sender->memory + (first + run) * size,
			            sender->page_size))
				zeros = 1;
			else
				run++;
		}
		int error = run ? add_data_run(sender, out, first, (uint32_t)run) : 0;
		first += run;
		while (zeros && first + zeros < end &&
		        copy_live_page(
		                out->copies, sender->memory + (first + zeros) * size, sender->page_size))
			zeros++;
		if (!error && zeros)
			error = add_zero_run(out, first, zeros);
		if (error)
			return error;
		first += zeros;
	}
	return 0;
}
