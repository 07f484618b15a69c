/* The frames of postcopy: what comes back from the wire, and every frame that may not come. */
#include <errno.h>
#include <string.h>

#include "postcopy/bitmap.h"
#include "postcopy/protocol.h"
#include "tests/check.h"

enum { PAGE = 4096, PAGES = 1000 };

static const struct umm_protocol destination = {
        .side = UMM_SIDE_DESTINATION,
        .connection = UMM_CONNECTION_DATA,
        .phase = UMM_PHASE_PRECOPY,
        .page_size = PAGE,
        .pages = PAGES,
};

static void test_round_trip(void)
{
	const struct umm_frame frame = {
	        .type = UMM_FRAME_PAGES,
	        .flags = UMM_FRAME_ZERO,
	        .first = 0x123456789abcdef0,
	        .count = 0x89abcdef,
	        .length = 0x76543210,
	        .payload_check = 0xdeadbeef,
	};
	uint8_t bytes[UMM_FRAME_HEADER];
	umm_frame_encode(&frame, bytes);
	/* little-endian on every machine */
	CHECK(bytes[0] == 'U' && bytes[1] == 'M' && bytes[2] == 'P' && bytes[3] == 'C');
	CHECK(bytes[4] == UMM_FRAME_VERSION && bytes[5] == UMM_FRAME_PAGES && bytes[8] == 0xf0 &&
	        bytes[15] == 0x12);
	struct umm_frame back;
	CHECK(umm_frame_decode(bytes, &back) == 0);
	CHECK(back.type == frame.type && back.flags == frame.flags && back.first == frame.first);
	CHECK(back.count == frame.count && back.length == frame.length);
	CHECK(back.payload_check == frame.payload_check);
	for (unsigned bit = 0; bit < 28 * 8; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
		CHECK(umm_frame_decode(bytes, &back) != 0);
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
}

static int check(struct umm_protocol protocol, int phase, struct umm_frame frame)
{
	protocol.phase = phase;
	return umm_protocol_check(&protocol, &frame);
}

static void test_ranges_and_lengths(void)
{
	struct umm_frame pages = {
	        .type = UMM_FRAME_PAGES, .first = 990, .count = 10, .length = 10 * (PAGE + 8)};
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == 0);
	pages.first = 991;
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EPROTO);
	pages.first = UINT64_MAX;
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EPROTO);
	pages = (struct umm_frame){.type = UMM_FRAME_PAGES, .count = 257, .length = 257 * (PAGE + 8)};
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EMSGSIZE);
	pages = (struct umm_frame){.type = UMM_FRAME_PAGES, .count = 1, .length = PAGE + 7};
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EPROTO);
	pages.length = PAGE + 9;
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EMSGSIZE);
	pages = (struct umm_frame){.type = UMM_FRAME_PAGES, .flags = UMM_FRAME_ZERO, .count = PAGES};
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == 0);
	pages.flags = 2;
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EPROTO);
	pages = (struct umm_frame){.type = UMM_FRAME_PAGES, .flags = UMM_FRAME_ZERO, .count = 0};
	CHECK(check(destination, UMM_PHASE_PRECOPY, pages) == -EPROTO);

	struct umm_frame bitmap = {.type = UMM_FRAME_SWITCH, .first = PAGES, .length = (PAGES + 7) / 8};
	CHECK(check(destination, UMM_PHASE_PRECOPY, bitmap) == 0);
	bitmap.first = PAGES + 1;
	CHECK(check(destination, UMM_PHASE_PRECOPY, bitmap) == -EPROTO);
	bitmap = (struct umm_frame){.type = UMM_FRAME_SWITCH, .length = PAGES / 8 + 1};
	CHECK(check(destination, UMM_PHASE_PRECOPY, bitmap) == -EMSGSIZE);

	struct umm_frame state = {.type = UMM_FRAME_STATE, .length = UMM_FRAME_MAX_TEXT};
	CHECK(check(destination, UMM_PHASE_PRECOPY, state) == 0);
	state.length++;
	CHECK(check(destination, UMM_PHASE_PRECOPY, state) == -EMSGSIZE);
}

/* Each type comes to one side, in its phases only. */
static void test_phases(void)
{
	static const struct {
		int type, side, connection;
		unsigned phases;
		uint32_t count, length;
	} legal[] = {
	        {UMM_FRAME_HELLO, UMM_SIDE_SOURCE, 0, 1 << UMM_PHASE_HELLO, 0, 16},
	        {UMM_FRAME_HELLO, UMM_SIDE_SOURCE, 1, 1 << UMM_PHASE_HELLO, 0, 16},
	        {UMM_FRAME_WELCOME, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_HELLO, 0, 24},
	        {UMM_FRAME_WELCOME, UMM_SIDE_DESTINATION, 1, 1 << UMM_PHASE_HELLO, 0, 24},
	        {UMM_FRAME_PAGES, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_PRECOPY | 1 << UMM_PHASE_POSTCOPY,
	                1, PAGE + 8},
	        {UMM_FRAME_PAGES, UMM_SIDE_DESTINATION, 1,
	                1 << UMM_PHASE_POSTCOPY | 1 << UMM_PHASE_VERIFY | 1 << UMM_PHASE_FINISH, 1, PAGE + 8},
	        {UMM_FRAME_ROUND, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_PRECOPY, 0, 0},
	        {UMM_FRAME_STATE, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_PRECOPY, 0, 10},
	        {UMM_FRAME_SWITCH, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_PRECOPY, 0, PAGES / 8},
	        {UMM_FRAME_RUNNING, UMM_SIDE_SOURCE, 0, 1 << UMM_PHASE_POSTCOPY, 0, 0},
	        {UMM_FRAME_REQUEST, UMM_SIDE_SOURCE, 1,
	                1 << UMM_PHASE_POSTCOPY | 1 << UMM_PHASE_VERIFY | 1 << UMM_PHASE_FINISH, 1, 0},
	        {UMM_FRAME_STREAMED, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_POSTCOPY, 0, 0},
	        {UMM_FRAME_DIGESTS, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_VERIFY, 1, 8},
	        {UMM_FRAME_RESULT, UMM_SIDE_SOURCE, 0, 1 << UMM_PHASE_VERIFY, 0, 16},
	        {UMM_FRAME_FINISH, UMM_SIDE_SOURCE, 0, 1 << UMM_PHASE_FINISH, 0, 10},
	        {UMM_FRAME_VERDICT, UMM_SIDE_DESTINATION, 0, 1 << UMM_PHASE_FINISH, 0, 10},
	};
	for (int type = 0; type < UMM_FRAME_TYPES + 3; type++) {
		if (type == UMM_FRAME_ALIVE || type == UMM_FRAME_ERROR)
			continue;
		for (int place = 0; place < UMM_PHASES * 4; place++) {
			int phase = place / 4, side = place / 2 % 2, connection = place % 2,
			    expected = -EPROTO;
			struct umm_frame frame = {.type = (uint8_t)type};
			for (unsigned i = 0; i < sizeof legal / sizeof *legal; i++) {
				if (legal[i].type != type)
					continue;
				frame.count = legal[i].count;
				frame.length = legal[i].length;
				if (legal[i].side == side && legal[i].connection == connection &&
				        legal[i].phases >> phase & 1)
					expected = 0;
			}
			struct umm_protocol protocol = destination;
			protocol.side = side;
			protocol.connection = connection;
			CHECK(check(protocol, phase, frame) == expected);
		}
	}
}

static void test_bitmap(void)
{
	uint8_t bitmap[13] = {0};
	CHECK(umm_bitmap_bytes(100) == 13 && umm_bitmap_bytes(96) == 12 && umm_bitmap_bytes(97) == 13);
	CHECK(umm_bitmap_next(bitmap, 100, 0, true) == 100);
	CHECK(!umm_bitmap_test_and_set(bitmap, 99) && umm_bitmap_test_and_set(bitmap, 99));
	CHECK(!umm_bitmap_test_and_set(bitmap, 40));
	CHECK(umm_bitmap_next(bitmap, 100, 0, true) == 40 && umm_bitmap_next(bitmap, 100, 41, true) == 99);
	CHECK(umm_bitmap_next(bitmap, 99, 41, true) == 99 && umm_bitmap_next(bitmap, 100, 40, false) == 41);
	umm_bitmap_clear(bitmap, 40);
	CHECK(umm_bitmap_next(bitmap, 100, 0, true) == 99);
	memset(bitmap, 0xff, sizeof bitmap);
	CHECK(umm_bitmap_next(bitmap, 100, 3, false) == 100);
}

int main(void)
{
	test_round_trip();
	test_ranges_and_lengths();
	test_phases();
	test_bitmap();
	return 0;
}
