/* Frames on a byte stream that may not block: whole frames in, one frame at a time out.
 *
 * Nothing is queued but small answers. Bulk data is asked for when the frame before it has left, so that
 * memory stays bounded and an answer waits for one frame at most.
 */
#ifndef UMM_GUEST_WIRE_H
#define UMM_GUEST_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest/frame.h"

enum {
	UMM_WIRE_DATA_MAX = 256 << 10, /* of one frame that the agent sends */
	UMM_WIRE_ANSWERS_MAX = 64 << 10,
	UMM_WIRE_ANSWER_MAX = 2 << 10,
};

struct umm_frame {
	uint32_t type;
	uint32_t id;
	uint32_t length;
	const unsigned char *payload; /* until the next umm_wire_receive() */
};

struct umm_wire {
	int fd;
	uint32_t out_sequence, in_sequence;
	size_t out_length, out_done;
	size_t answers_length;
	size_t in_begin, in_end;
	unsigned char out[UMM_FRAME_HEADER + UMM_WIRE_DATA_MAX];
	unsigned char answers[UMM_WIRE_ANSWERS_MAX];
	unsigned char in[UMM_FRAME_HEADER + UMM_FRAME_PAYLOAD_MAX];
};

/* CRC-32 as zlib's: begin with 0, go on with the result. */
uint32_t umm_crc32(uint32_t crc, const void *data, size_t length);

uint32_t umm_get_u32(const unsigned char *from);
uint64_t umm_get_u64(const unsigned char *from);
void umm_put_u32(unsigned char *to, uint32_t value);
void umm_put_u64(unsigned char *to, uint64_t value);

/* Makes `fd` non-blocking. */
int umm_wire_init(struct umm_wire *wire, int fd);

/* Queue a small answer; it goes before any bulk data. -ENOBUFS when the other side does not read. */
int umm_wire_answer(struct umm_wire *wire, uint32_t type, uint32_t id, const void *payload, size_t length);
/* A FAULT with the text of `error`, and what failed. */
int umm_wire_fault(struct umm_wire *wire, uint32_t id, int error, const char *what);
/* Whether requests may be taken: there is room for their answers. */
bool umm_wire_has_room(const struct umm_wire *wire);

/* Whether a frame of bulk data may be begun: write up to UMM_WIRE_DATA_MAX bytes to umm_wire_data(), then
 * umm_wire_send(). */
bool umm_wire_is_idle(const struct umm_wire *wire);
unsigned char *umm_wire_data(struct umm_wire *wire);
void umm_wire_send(struct umm_wire *wire, uint32_t type, uint32_t id, size_t length);

/* Write what can be written now. 0, or negative errno when the channel is gone. */
int umm_wire_flush(struct umm_wire *wire);

/* 1: a frame, 0: none yet, negative errno: -EPIPE the end, -EBADMSG a damaged frame. */
int umm_wire_receive(struct umm_wire *wire, struct umm_frame *frame);

#endif
