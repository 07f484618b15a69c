#include "guest/serve.h"

#include <errno.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include <fcntl.h>

#include "guest/command.h"
#include "guest/files.h"
#include "guest/wire.h"

struct agent {
	bool is_init;
	struct umm_wire wire;
	struct umm_command command;
	struct umm_get get;
	struct umm_put put;
};

enum { POWER_OFF = 1, ENTROPY_MAX = 512, FRAMES_PER_TURN = 16 };

static volatile sig_atomic_t child_ended;

static void on_child(int number)
{
	(void)number;
	child_ended = 1;
}

static void say_hello(struct agent *agent)
{
	char text[1024];
	struct utsname name;

	uname(&name);
	long page = (long)getauxval(AT_PAGESZ);
	int length = snprintf(text, sizeof text,
	        "protocol=%d\npage_size=%ld\nrelease=%s\nmachine=%s\ncpus=%ld\nmemory=%lld\npvpanic=%d\n",
	        UMM_AGENT_PROTOCOL, page, name.release, name.machine, sysconf(_SC_NPROCESSORS_ONLN),
	        (long long)sysconf(_SC_PHYS_PAGES) * page, !access("/sys/bus/pci/drivers/pvpanic-pci", F_OK));
	umm_wire_answer(&agent->wire, UMM_FRAME_HELLO, 0, text, (size_t)length);
}

/* A guest that was resumed from a saved state has the clock and the random numbers of the moment it was
 * saved. */
static int set_clock(struct agent *agent, const struct umm_frame *frame)
{
	struct {
		struct rand_pool_info info;
		unsigned char bytes[ENTROPY_MAX];
	} pool;

	if (frame->length < 8 || frame->length - 8 > ENTROPY_MAX)
		return -EPROTO;
	if (agent->is_init) {
		uint64_t ns = umm_get_u64(frame->payload);
		struct timespec time = {
		        .tv_sec = (time_t)(ns / 1000000000),
		        .tv_nsec = (long)(ns % 1000000000),
		};
		int random = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
		pool.info.buf_size = (int)frame->length - 8;
		pool.info.entropy_count = pool.info.buf_size * 8;
		memcpy(pool.info.buf, frame->payload + 8, frame->length - 8);
		bool failed = clock_settime(CLOCK_REALTIME, &time) || random < 0 ||
		              ioctl(random, RNDADDENTROPY, &pool.info) || ioctl(random, RNDRESEEDCRNG);
		int error = errno;
		if (random >= 0)
			close(random);
		if (failed) {
			umm_wire_fault(&agent->wire, frame->id, error, "setting the clock");
			return 0;
		}
	}
	umm_wire_answer(&agent->wire, UMM_FRAME_PONG, frame->id, NULL, 0);
	return 0;
}

static void begin_get(struct agent *agent, const struct umm_frame *frame)
{
	if (agent->get.active || agent->command.state != UMM_COMMAND_NONE)
		umm_wire_fault(&agent->wire, frame->id, EBUSY, "GET while a command or a GET runs");
	else
		umm_get_begin(&agent->get, &agent->wire, frame);
}

/* 0, POWER_OFF, or negative errno when the conversation cannot go on. */
static int dispatch(struct agent *agent, const struct umm_frame *frame)
{
	switch (frame->type) {
	case UMM_FRAME_START:
		if (agent->get.active)
			umm_wire_fault(&agent->wire, frame->id, EBUSY, "START while a GET runs");
		else
			umm_command_start(&agent->command, &agent->wire, frame);
		return 0;
	case UMM_FRAME_STDIN:
		return umm_command_stdin(&agent->command, &agent->wire, frame);
	case UMM_FRAME_SIGNAL:
		umm_command_signal(&agent->command, frame);
		return 0;
	case UMM_FRAME_RESIZE:
		umm_command_resize(&agent->command, frame);
		return 0;
	case UMM_FRAME_PUT:
		return umm_put_begin(&agent->put, frame);
	case UMM_FRAME_PUT_DATA:
		return umm_put_data(&agent->put, frame);
	case UMM_FRAME_PUT_END:
		return umm_put_end(&agent->put, &agent->wire, frame);
	case UMM_FRAME_GET:
		begin_get(agent, frame);
		return 0;
	case UMM_FRAME_PING:
		return umm_wire_answer(&agent->wire, UMM_FRAME_PONG, frame->id, frame->payload, frame->length)
		               ? -EPROTO
		               : 0;
	case UMM_FRAME_CLOCK:
		return set_clock(agent, frame);
	case UMM_FRAME_POWER_OFF:
		return POWER_OFF;
	default:
		return -EPROTO;
	}
}

/* What came in. `drained`: nothing is left of it. */
static int take_requests(struct agent *agent, bool *drained)
{
	*drained = false;
	/* A few at a time, so that a host that sends without end still hears from us. */
	for (int i = 0; i < FRAMES_PER_TURN && umm_wire_has_room(&agent->wire); i++) {
		struct umm_frame frame;
		int got = umm_wire_receive(&agent->wire, &frame);
		if (!got) {
			*drained = true;
			return 0;
		}
		int result = got < 0 ? got : dispatch(agent, &frame);
		if (result)
			return result;
	}
	return 0;
}

/* Send what there is, at most one frame of bulk data. */
static int send_some(struct agent *agent)
{
	int err = umm_wire_flush(&agent->wire);

	if (err || !umm_wire_is_idle(&agent->wire))
		return err;
	if (agent->get.active)
		umm_get_step(&agent->get, &agent->wire);
	else
		umm_command_pump(&agent->command, &agent->wire);
	umm_command_finish(&agent->command, &agent->wire);
	return umm_wire_flush(&agent->wire);
}

static void wait_for_something(struct agent *agent, bool drained, const sigset_t *unblocked)
{
	struct umm_command *command = &agent->command;
	struct umm_wire *wire = &agent->wire;
	struct pollfd polled[2 + UMM_OUTS];
	struct timespec at_once = {0}, soon = {.tv_nsec = 100000000}, *limit = NULL;
	nfds_t count = 0;

	bool idle = umm_wire_is_idle(wire), room = umm_wire_has_room(wire);
	polled[count++] = (struct pollfd){
	        .fd = wire->fd,
	        .events = (short)((room ? POLLIN : 0) | (idle ? 0 : POLLOUT)),
	};
	if (command->in >= 0 && command->in_length && room)
		polled[count++] = (struct pollfd){.fd = command->in, .events = POLLOUT};
	for (int i = 0; idle && i < UMM_OUTS; i++) {
		if (command->out[i] >= 0)
			polled[count++] = (struct pollfd){.fd = command->out[i], .events = POLLIN};
	}
	if (command->state == UMM_COMMAND_ENDING)
		limit = &soon;
	if ((!drained && room) || (idle && (agent->get.active || (command->state == UMM_COMMAND_ENDING &&
	                                                                 !command->ending_since_ns))))
		limit = &at_once;
	(void)ppoll(polled, count, limit, unblocked);
}

static int converse(struct agent *agent, const sigset_t *unblocked)
{
	for (;;) {
		bool drained;
		int err = take_requests(agent, &drained);
		if (err)
			return err;
		if (child_ended || agent->command.state == UMM_COMMAND_ENDING) {
			child_ended = 0;
			umm_command_reap(&agent->command, agent->is_init);
		}
		if (umm_wire_has_room(&agent->wire))
			umm_command_feed(&agent->command, &agent->wire);
		err = send_some(agent);
		if (err)
			return err;
		wait_for_something(agent, drained, unblocked);
	}
}

int umm_serve(int fd, bool is_init, const char *failure, int error)
{
	static struct agent agent;
	struct sigaction on_end = {.sa_handler = on_child, .sa_flags = SA_NOCLDSTOP};
	struct sigaction ignore = {.sa_handler = SIG_IGN};
	sigset_t blocked, unblocked;

	agent.is_init = is_init;
	umm_command_init(&agent.command);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGCHLD);
	sigprocmask(SIG_BLOCK, &blocked, &unblocked);
	sigdelset(&unblocked, SIGCHLD);
	sigaction(SIGCHLD, &on_end, NULL);
	sigaction(SIGPIPE, &ignore, NULL);
	int result = umm_wire_init(&agent.wire, fd);
	if (result)
		return result;
	if (failure)
		umm_wire_fault(&agent.wire, 0, error, failure);
	else
		say_hello(&agent);
	result = converse(&agent, &unblocked);
	umm_command_abandon(&agent.command);
	umm_put_abandon(&agent.put);
	umm_get_end(&agent.get);
	/* The host went away, perhaps without reading all (a socket says ECONNRESET then): nobody is left to
	 * tell. */
	return result == -EPIPE || result == -ECONNRESET ? 0 : result;
}
