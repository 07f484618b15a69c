/* The frames of the guest's agent: whole, in order, checked, and never more than one in the way of an answer.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest/wire.h"
#include "tests/check.h"

static struct umm_wire agent, host;

static void connect_wires(void)
{
	int ends[2];

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
	CHECK_OK(umm_wire_init(&agent, ends[0]));
	CHECK_OK(umm_wire_init(&host, ends[1]));
}

static void disconnect_wires(void)
{
	close(agent.fd);
	close(host.fd);
}

/* The next frame that `agent` sent, however often it has to write for it. */
static struct umm_frame next_frame(void)
{
	struct umm_frame frame;
	int got;

	do {
		CHECK_OK(umm_wire_flush(&agent));
		got = umm_wire_receive(&host, &frame);
	} while (!got);
	CHECK_EQUAL(got, 1);
	return frame;
}

static void test_checksum_is_zlibs(void)
{
	CHECK_EQUAL(umm_crc32(0, "123456789", 9), 0xcbf43926);
	CHECK_EQUAL(umm_crc32(umm_crc32(0, "1234", 4), "56789", 5), 0xcbf43926);
	CHECK_EQUAL(umm_crc32(0, "", 0), 0);
	/* Longer than one step of eight, from every offset. */
	unsigned char data[64];
	for (size_t i = 0; i < sizeof data; i++)
		data[i] = (unsigned char)(i * 37);
	for (size_t begin = 0; begin < 16; begin++) {
		uint32_t by_byte = 0;
		for (size_t i = begin; i < sizeof data; i++)
			by_byte = umm_crc32(by_byte, data + i, 1);
		CHECK_EQUAL(umm_crc32(0, data + begin, sizeof data - begin), by_byte);
	}
}

static void test_frames_arrive_whole_and_in_order(void)
{
	connect_wires();
	for (uint32_t size = 0; size <= UMM_WIRE_DATA_MAX; size = size * 3 + 1) {
		CHECK(umm_wire_is_idle(&agent));
		memset(umm_wire_data(&agent), (int)size, size);
		umm_wire_send(&agent, UMM_FRAME_STDOUT, size + 1, size);
		struct umm_frame frame = next_frame();
		CHECK_EQUAL(frame.type, UMM_FRAME_STDOUT);
		CHECK_EQUAL(frame.id, size + 1);
		CHECK_EQUAL(frame.length, size);
		for (uint32_t i = 0; i < size; i++)
			CHECK_EQUAL(frame.payload[i], (unsigned char)size);
	}
	disconnect_wires();
}

static void test_an_answer_waits_for_one_frame_at_most(void)
{
	connect_wires();
	/* Nobody reads: the frame does not fit into the socket. */
	umm_wire_send(&agent, UMM_FRAME_STDOUT, 1, UMM_WIRE_DATA_MAX);
	CHECK_OK(umm_wire_flush(&agent));
	CHECK(!umm_wire_is_idle(&agent));
	CHECK_OK(umm_wire_answer(&agent, UMM_FRAME_PONG, 7, "x", 1));
	CHECK_OK(umm_wire_fault(&agent, 8, ENOSPC, "writing"));
	CHECK_EQUAL(next_frame().type, UMM_FRAME_STDOUT);
	struct umm_frame pong = next_frame();
	CHECK_EQUAL(pong.type, UMM_FRAME_PONG);
	CHECK_EQUAL(pong.id, 7);
	struct umm_frame fault = next_frame();
	CHECK_EQUAL(fault.type, UMM_FRAME_FAULT);
	CHECK_EQUAL(umm_get_u32(fault.payload), ENOSPC);
	CHECK(!strncmp((const char *)fault.payload + 4, "writing: ", 9));
	disconnect_wires();
}

static void test_answers_are_bounded(void)
{
	static const unsigned char large[UMM_WIRE_ANSWER_MAX + 1];
	int queued = 0;

	connect_wires();
	CHECK_EQUAL(umm_wire_answer(&agent, UMM_FRAME_PONG, 0, large, sizeof large), -ENOBUFS);
	while (umm_wire_has_room(&agent)) {
		CHECK_OK(umm_wire_answer(&agent, UMM_FRAME_PONG, (uint32_t)queued, large, sizeof large - 1));
		queued++;
	}
	CHECK(queued > 2);
	for (int i = 0; i < queued; i++)
		CHECK_EQUAL(next_frame().id, i);
	CHECK(umm_wire_has_room(&agent));
	disconnect_wires();
}

/* What `host` makes of these bytes. */
static int receive_bytes(const unsigned char *bytes, size_t length)
{
	struct umm_frame frame;

	CHECK_EQUAL(write(agent.fd, bytes, length), length);
	return umm_wire_receive(&host, &frame);
}

static void test_damage_is_refused(void)
{
	unsigned char good[UMM_FRAME_HEADER + 5];

	connect_wires();
	memcpy(umm_wire_data(&agent), "hello", 5);
	umm_wire_send(&agent, UMM_FRAME_STDOUT, 1, 5);
	memcpy(good, agent.out, sizeof good);
	disconnect_wires();
	for (size_t bit = 0; bit < 8 * sizeof good; bit++) {
		unsigned char bad[sizeof good];
		memcpy(bad, good, sizeof good);
		bad[bit / 8] ^= (unsigned char)(1 << bit % 8);
		connect_wires();
		int got = receive_bytes(bad, sizeof bad);
		/* A length that grew is waited for. */
		if (!got)
			CHECK(bit / 8 >= 8 && bit / 8 < 12);
		else
			CHECK_EQUAL(got, -EBADMSG);
		disconnect_wires();
	}
	connect_wires();
	CHECK_EQUAL(receive_bytes(good, sizeof good), 1);
	CHECK_EQUAL(receive_bytes(good, sizeof good), -EBADMSG); /* twice */
	disconnect_wires();
}

static void test_the_end_is_told(void)
{
	struct umm_frame frame;

	connect_wires();
	CHECK_EQUAL(umm_wire_receive(&host, &frame), 0);
	shutdown(agent.fd, SHUT_WR);
	CHECK_EQUAL(umm_wire_receive(&host, &frame), -EPIPE);
	disconnect_wires();
}

int main(void)
{
	test_checksum_is_zlibs();
	test_frames_arrive_whole_and_in_order();
	test_an_answer_waits_for_one_frame_at_most();
	test_answers_are_bounded();
	test_damage_is_refused();
	test_the_end_is_told();
	return 0;
}
