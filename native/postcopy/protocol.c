#include "postcopy/protocol.h"

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <xxhash.h>

static const char *const frame_names[UMM_FRAME_TYPES] = {"?", "HELLO", "WELCOME", "PAGES", "ROUND", "STATE",
        "SWITCH", "RUNNING", "REQUEST", "STREAMED", "DIGESTS", "RESULT", "FINISH", "VERDICT", "ALIVE",
        "ERROR"};
static const char *const phase_names[UMM_PHASES] = {
        "hello", "precopy", "postcopy", "verify", "finish", "done"};

const char *umm_frame_name(int type)
{
	return type > 0 && type < UMM_FRAME_TYPES ? frame_names[type] : "unknown";
}

const char *umm_phase_name(int phase)
{
	return phase >= 0 && phase < UMM_PHASES ? phase_names[phase] : "unknown";
}

static void put16(uint8_t *to, uint16_t value)
{
	value = htole16(value);
	memcpy(to, &value, sizeof value);
}

static void put32(uint8_t *to, uint32_t value)
{
	value = htole32(value);
	memcpy(to, &value, sizeof value);
}

static void put64(uint8_t *to, uint64_t value)
{
	value = htole64(value);
	memcpy(to, &value, sizeof value);
}

static uint16_t get16(const uint8_t *from)
{
	uint16_t value;
	memcpy(&value, from, sizeof value);
	return le16toh(value);
}

static uint32_t get32(const uint8_t *from)
{
	uint32_t value;
	memcpy(&value, from, sizeof value);
	return le32toh(value);
}

static uint64_t get64(const uint8_t *from)
{
	uint64_t value;
	memcpy(&value, from, sizeof value);
	return le64toh(value);
}

uint32_t umm_frame_payload_check(const void *payload, uint32_t len)
{
	return (uint32_t)XXH3_64bits(payload, len);
}

uint64_t umm_page_digest(const void *page, uint32_t page_size)
{
	return XXH3_64bits(page, page_size);
}

void umm_frame_encode(const struct umm_frame *frame, uint8_t out[UMM_FRAME_HEADER])
{
	put32(out, UMM_FRAME_MAGIC);
	out[4] = UMM_FRAME_VERSION;
	out[5] = frame->type;
	put16(out + 6, frame->flags);
	put64(out + 8, frame->first);
	put32(out + 16, frame->count);
	put32(out + 20, frame->length);
	put32(out + 24, umm_frame_payload_check(out, 24));
	put32(out + 28, frame->payload_check);
}

int umm_frame_decode(const uint8_t in[UMM_FRAME_HEADER], struct umm_frame *ret)
{
	if (get32(in) != UMM_FRAME_MAGIC || in[4] != UMM_FRAME_VERSION)
		return -EPROTO;
	if (get32(in + 24) != umm_frame_payload_check(in, 24))
		return -EBADMSG;
	*ret = (struct umm_frame){
	        .type = in[5],
	        .flags = get16(in + 6),
	        .first = get64(in + 8),
	        .count = get32(in + 16),
	        .length = get32(in + 20),
	        .payload_check = get32(in + 28),
	};
	return 0;
}

uint32_t umm_frame_checked_bytes(const struct umm_frame *frame)
{
	if (frame->type != UMM_FRAME_PAGES)
		return frame->length;
	return frame->flags & UMM_FRAME_ZERO ? 0 : frame->count * 8;
}

uint32_t umm_frame_max_pages(uint32_t page_size)
{
	return page_size < UMM_FRAME_MAX_DATA ? UMM_FRAME_MAX_DATA / page_size : 1;
}

/* Phases in which a side may be sent a type, as a set of bits; the connection it comes on. */
struct rule {
	uint8_t phases[2]; /* [enum umm_side of the reader] */
	uint8_t connections;
};

enum {
	HELLO = 1 << UMM_PHASE_HELLO,
	PRECOPY = 1 << UMM_PHASE_PRECOPY,
	POSTCOPY = 1 << UMM_PHASE_POSTCOPY,
	VERIFY = 1 << UMM_PHASE_VERIFY,
	FINISH = 1 << UMM_PHASE_FINISH,
	AFTER_SWITCH = POSTCOPY | VERIFY | FINISH,
	ANY = HELLO | PRECOPY | AFTER_SWITCH,
	DATA = 1 << UMM_CONNECTION_DATA,
	URGENT = 1 << UMM_CONNECTION_URGENT,
	BOTH = DATA | URGENT,
};

static const struct rule rules[UMM_FRAME_TYPES] = {
        [UMM_FRAME_HELLO] = {{HELLO, 0}, BOTH},
        [UMM_FRAME_WELCOME] = {{0, HELLO}, BOTH},
        [UMM_FRAME_PAGES] = {{0, PRECOPY | POSTCOPY}, BOTH},
        [UMM_FRAME_ROUND] = {{0, PRECOPY}, DATA},
        [UMM_FRAME_STATE] = {{0, PRECOPY}, DATA},
        [UMM_FRAME_SWITCH] = {{0, PRECOPY}, DATA},
        [UMM_FRAME_RUNNING] = {{POSTCOPY, 0}, DATA},
        /* the urgent connection has no order relative to DATA: late requests and answers are normal */
        [UMM_FRAME_REQUEST] = {{AFTER_SWITCH, 0}, URGENT},
        [UMM_FRAME_STREAMED] = {{0, POSTCOPY}, DATA},
        [UMM_FRAME_DIGESTS] = {{0, VERIFY}, DATA},
        [UMM_FRAME_RESULT] = {{VERIFY, 0}, DATA},
        [UMM_FRAME_FINISH] = {{FINISH, 0}, DATA},
        [UMM_FRAME_VERDICT] = {{0, FINISH}, DATA},
        [UMM_FRAME_ALIVE] = {{AFTER_SWITCH, AFTER_SWITCH}, DATA},
        [UMM_FRAME_ERROR] = {{ANY, ANY}, BOTH},
};

static bool may_come(const struct umm_protocol *protocol, const struct umm_frame *frame)
{
	if (frame->type == 0 || frame->type >= UMM_FRAME_TYPES)
		return false;
	const struct rule *rule = &rules[frame->type];
	unsigned phases = rule->phases[protocol->side];
	/* answers on URGENT may trail STREAMED, but never precede SWITCH */
	if (phases && frame->type == UMM_FRAME_PAGES && protocol->connection == UMM_CONNECTION_URGENT)
		phases = AFTER_SWITCH;
	return (phases >> protocol->phase & 1) && (rule->connections >> protocol->connection & 1);
}

static bool in_range(const struct umm_protocol *protocol, const struct umm_frame *frame)
{
	return frame->count > 0 && frame->first < protocol->pages &&
	       frame->count <= protocol->pages - frame->first;
}

static int expect(const struct umm_frame *frame, uint64_t length)
{
	return frame->length == length ? 0 : frame->length > length ? -EMSGSIZE : -EPROTO;
}

static int at_most(const struct umm_frame *frame, uint32_t most)
{
	return frame->length <= most ? 0 : -EMSGSIZE;
}

int umm_protocol_check(const struct umm_protocol *protocol, const struct umm_frame *frame)
{
	if (!may_come(protocol, frame))
		return -EPROTO;
	if (frame->flags & ~(frame->type == UMM_FRAME_PAGES ? UMM_FRAME_ZERO : 0))
		return -EPROTO;
	switch (frame->type) {
	case UMM_FRAME_HELLO:
		return expect(frame, sizeof(struct umm_hello));
	case UMM_FRAME_WELCOME:
		return expect(frame, sizeof(struct umm_welcome));
	case UMM_FRAME_PAGES:
		if (!in_range(protocol, frame))
			return -EPROTO;
		if (frame->flags & UMM_FRAME_ZERO)
			return expect(frame, 0);
		if (frame->count > umm_frame_max_pages(protocol->page_size))
			return -EMSGSIZE;
		return expect(frame, (uint64_t)frame->count * (8 + protocol->page_size));
	case UMM_FRAME_REQUEST:
		if (!in_range(protocol, frame))
			return -EPROTO;
		if (frame->count > umm_frame_max_pages(protocol->page_size))
			return -EMSGSIZE;
		return expect(frame, 0);
	case UMM_FRAME_SWITCH:
		return frame->first <= protocol->pages ? expect(frame, (protocol->pages + 7) / 8) : -EPROTO;
	case UMM_FRAME_DIGESTS:
		if (!in_range(protocol, frame))
			return -EPROTO;
		if (frame->count > UMM_FRAME_MAX_DIGESTS)
			return -EMSGSIZE;
		return expect(frame, (uint64_t)frame->count * 8);
	case UMM_FRAME_RESULT:
		return expect(frame, 16);
	case UMM_FRAME_STATE:
	case UMM_FRAME_FINISH:
	case UMM_FRAME_VERDICT:
		return at_most(frame, UMM_FRAME_MAX_TEXT);
	case UMM_FRAME_ERROR:
		return at_most(frame, UMM_FRAME_MAX_ERROR);
	default: /* ROUND, RUNNING, STREAMED, ALIVE */
		return expect(frame, 0);
	}
}
