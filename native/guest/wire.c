#include "guest/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Eight bytes at a time: under emulation a byte-wise sum would cost more than the copy. */
static uint32_t crc_table[8][256];

static void fill_crc_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;
		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
		crc_table[0][i] = crc;
	}
	for (int slice = 1; slice < 8; slice++) {
		for (int i = 0; i < 256; i++) {
			uint32_t crc = crc_table[slice - 1][i];
			crc_table[slice][i] = crc >> 8 ^ crc_table[0][crc & 0xff];
		}
	}
}

uint32_t umm_crc32(uint32_t crc, const void *data, size_t length)
{
	const unsigned char *at = data;

	if (!crc_table[0][1])
		fill_crc_table();
	crc = ~crc;
	for (; length >= 8; length -= 8, at += 8) {
		uint32_t low = umm_get_u32(at) ^ crc, high = umm_get_u32(at + 4);
		crc = crc_table[7][low & 0xff] ^ crc_table[6][low >> 8 & 0xff] ^
		      crc_table[5][low >> 16 & 0xff] ^ crc_table[4][low >> 24] ^ crc_table[3][high & 0xff] ^
		      crc_table[2][high >> 8 & 0xff] ^ crc_table[1][high >> 16 & 0xff] ^
		      crc_table[0][high >> 24];
	}
	for (; length; length--, at++)
		crc = crc >> 8 ^ crc_table[0][(crc ^ *at) & 0xff];
	return ~crc;
}

uint32_t umm_get_u32(const unsigned char *from)
{
	return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

uint64_t umm_get_u64(const unsigned char *from)
{
	return umm_get_u32(from) | (uint64_t)umm_get_u32(from + 4) << 32;
}

void umm_put_u32(unsigned char *to, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		to[i] = (unsigned char)(value >> 8 * i);
}

void umm_put_u64(unsigned char *to, uint64_t value)
{
	umm_put_u32(to, (uint32_t)value);
	umm_put_u32(to + 4, (uint32_t)(value >> 32));
}

int umm_wire_init(struct umm_wire *wire, int fd)
{
	wire->fd = fd;
	wire->out_sequence = wire->in_sequence = 0;
	wire->out_length = wire->out_done = 0;
	wire->answers_length = 0;
	wire->in_begin = wire->in_end = 0;
	int flags = fcntl(fd, F_GETFL);
	return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

/* In the queue an answer is type, id, length and payload: its number in the sequence and its checksum are
 * known when it leaves. */
enum { ANSWER_HEAD = 12 };

int umm_wire_answer(struct umm_wire *wire, uint32_t type, uint32_t id, const void *payload, size_t length)
{
	if (length > UMM_WIRE_ANSWER_MAX ||
	        wire->answers_length + ANSWER_HEAD + length > UMM_WIRE_ANSWERS_MAX)
		return -ENOBUFS;
	unsigned char *to = wire->answers + wire->answers_length;
	umm_put_u32(to, type);
	umm_put_u32(to + 4, id);
	umm_put_u32(to + 8, (uint32_t)length);
	if (length)
		memcpy(to + ANSWER_HEAD, payload, length);
	wire->answers_length += ANSWER_HEAD + length;
	return 0;
}

int umm_wire_fault(struct umm_wire *wire, uint32_t id, int error, const char *what)
{
	unsigned char payload[4 + 512];

	umm_put_u32(payload, (uint32_t)error);
	int length = snprintf((char *)payload + 4, sizeof payload - 4, "%s: %s", what, strerror(error));
	if (length > (int)sizeof payload - 5)
		length = (int)sizeof payload - 5;
	return umm_wire_answer(wire, UMM_FRAME_FAULT, id, payload, 4 + (size_t)length);
}

bool umm_wire_has_room(const struct umm_wire *wire)
{
	/* A request is answered by two frames at most, and a command has its STARTED, CREDIT and EXIT. */
	return wire->answers_length + 8 * (ANSWER_HEAD + UMM_WIRE_ANSWER_MAX) <= UMM_WIRE_ANSWERS_MAX;
}

bool umm_wire_is_idle(const struct umm_wire *wire)
{
	return !wire->out_length && !wire->answers_length;
}

unsigned char *umm_wire_data(struct umm_wire *wire)
{
	return wire->out + UMM_FRAME_HEADER;
}

void umm_wire_send(struct umm_wire *wire, uint32_t type, uint32_t id, size_t length)
{
	unsigned char *head = wire->out;

	umm_put_u32(head, UMM_FRAME_MAGIC);
	umm_put_u32(head + 4, type);
	umm_put_u32(head + 8, (uint32_t)length);
	umm_put_u32(head + 12, id);
	umm_put_u32(head + 16, wire->out_sequence++);
	umm_put_u32(head + 20, umm_crc32(umm_crc32(0, head, 20), head + UMM_FRAME_HEADER, length));
	wire->out_length = UMM_FRAME_HEADER + length;
	wire->out_done = 0;
}

static bool next_answer(struct umm_wire *wire)
{
	if (!wire->answers_length)
		return false;
	const unsigned char *from = wire->answers;
	uint32_t type = umm_get_u32(from), id = umm_get_u32(from + 4), length = umm_get_u32(from + 8);
	memcpy(umm_wire_data(wire), from + ANSWER_HEAD, length);
	wire->answers_length -= ANSWER_HEAD + length;
	memmove(wire->answers, from + ANSWER_HEAD + length, wire->answers_length);
	umm_wire_send(wire, type, id, length);
	return true;
}

int umm_wire_flush(struct umm_wire *wire)
{
	while (wire->out_length || next_answer(wire)) {
		ssize_t put = write(wire->fd, wire->out + wire->out_done, wire->out_length - wire->out_done);
		if (put < 0) {
			if (errno == EINTR)
				continue;
			/* The port copies what it is given, and may lack the memory for a moment. */
			return errno == EAGAIN || errno == ENOMEM ? 0 : -errno;
		}
		wire->out_done += (size_t)put;
		if (wire->out_done == wire->out_length)
			wire->out_length = wire->out_done = 0;
	}
	return 0;
}

/* The frame at the start of what came in, as umm_wire_receive(). */
static int take(struct umm_wire *wire, struct umm_frame *frame)
{
	const unsigned char *head = wire->in + wire->in_begin;
	size_t there = wire->in_end - wire->in_begin;

	if (there < UMM_FRAME_HEADER)
		return 0;
	uint32_t length = umm_get_u32(head + 8);
	if (umm_get_u32(head) != UMM_FRAME_MAGIC || length > UMM_FRAME_PAYLOAD_MAX ||
	        umm_get_u32(head + 16) != wire->in_sequence)
		return -EBADMSG;
	if (there < UMM_FRAME_HEADER + length)
		return 0;
	if (umm_crc32(umm_crc32(0, head, 20), head + UMM_FRAME_HEADER, length) != umm_get_u32(head + 20))
		return -EBADMSG;
	wire->in_sequence++;
	wire->in_begin += UMM_FRAME_HEADER + length;
	*frame = (struct umm_frame){
	        .type = umm_get_u32(head + 4),
	        .id = umm_get_u32(head + 12),
	        .length = length,
	        .payload = head + UMM_FRAME_HEADER,
	};
	return 1;
}

int umm_wire_receive(struct umm_wire *wire, struct umm_frame *frame)
{
	for (;;) {
		int taken = take(wire, frame);
		if (taken)
			return taken;
		/* What is left is less than a frame. */
		wire->in_end -= wire->in_begin;
		memmove(wire->in, wire->in + wire->in_begin, wire->in_end);
		wire->in_begin = 0;
		ssize_t got = read(wire->fd, wire->in + wire->in_end, sizeof wire->in - wire->in_end);
		if (got > 0)
			wire->in_end += (size_t)got;
		else if (!got)
			return -EPIPE;
		else if (errno != EINTR)
			return errno == EAGAIN || errno == ENOMEM ? 0 : -errno;
	}
}
