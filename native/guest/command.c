#include "guest/command.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "guest/cgroup.h"
#include "guest/spawn.h"

/* A process that cannot die (it waits for a device) must not keep the end from the host. */
static const uint64_t ending_limit_ns = 5000000000;
enum { START_HEAD = 20 };

static const uint32_t frame_types[UMM_OUTS] = {UMM_FRAME_STDOUT, UMM_FRAME_STDERR, UMM_FRAME_REPORT};

static char report_variable[] = "UMM_REPORT_FD=9";
_Static_assert(UMM_REPORT_DESCRIPTOR == 9, "report_variable says so");

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void close_if_open(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_ends(struct umm_command *command)
{
	for (int i = 0; i < UMM_OUTS; i++)
		close_if_open(&command->out[i]);
	close_if_open(&command->in);
}

void umm_command_init(struct umm_command *command)
{
	command->state = UMM_COMMAND_NONE;
	command->in = -1;
	for (int i = 0; i < UMM_OUTS; i++)
		command->out[i] = -1;
}

/* argv, and behind its NULL the environment, point into the frame. NULL when the payload is not what it says.
 */
static char **parse_texts(const struct umm_frame *frame, uint32_t argc, uint32_t envc, const char **cwd)
{
	const char *at = (const char *)frame->payload + START_HEAD;
	const char *end = (const char *)frame->payload + frame->length;

	/* Each text takes a byte at least. */
	if (!argc || argc > frame->length || envc > frame->length || end == at || end[-1])
		return NULL;
	char **texts = calloc((size_t)argc + envc + 3, sizeof *texts);
	if (!texts)
		return NULL;
	*cwd = at;
	at += strlen(at) + 1;
	for (uint32_t i = 0; i < argc + envc; i++) {
		if (at >= end) {
			free(texts);
			return NULL;
		}
		texts[i + (i >= argc)] = (char *)at;
		at += strlen(at) + 1;
	}
	texts[argc + 1 + envc] = report_variable;
	return texts;
}

static int open_terminal(
        struct umm_command *command, struct umm_spawn *spawn, uint32_t rows, uint32_t columns)
{
	struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};

	int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
	if (master < 0)
		return -errno;
	command->out[UMM_OUT_STDOUT] = master;
	if (unlockpt(master))
		return -errno;
	ioctl(master, TIOCSWINSZ, &size);
	int terminal = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (terminal < 0)
		return -errno;
	spawn->terminal = spawn->in = spawn->out = spawn->err = terminal;
	command->in = fcntl(master, F_DUPFD_CLOEXEC, 0);
	return command->in < 0 ? -errno : 0;
}

/* A pipe whose end of ours does not block. */
static int open_pipe(int *ours, int *theirs, bool to_child)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return -errno;
	*ours = ends[to_child];
	*theirs = ends[!to_child];
	return fcntl(*ours, F_SETFL, O_NONBLOCK) ? -errno : 0;
}

static int open_pipes(struct umm_command *command, struct umm_spawn *spawn, bool with_stdin)
{
	int err;

	if (with_stdin) {
		err = open_pipe(&command->in, &spawn->in, true);
	} else {
		spawn->in = open("/dev/null", O_RDONLY | O_CLOEXEC);
		err = spawn->in < 0 ? -errno : 0;
	}
	if (!err)
		err = open_pipe(&command->out[UMM_OUT_STDOUT], &spawn->out, false);
	if (!err)
		err = open_pipe(&command->out[UMM_OUT_STDERR], &spawn->err, false);
	return err;
}

static void close_childs_ends(struct umm_spawn *spawn)
{
	if (spawn->terminal >= 0)
		spawn->in = spawn->out = spawn->err = -1;
	close_if_open(&spawn->terminal);
	close_if_open(&spawn->in);
	close_if_open(&spawn->out);
	close_if_open(&spawn->err);
	close_if_open(&spawn->report);
	close_if_open(&spawn->cgroup);
}

static void answer_exit(
        struct umm_wire *wire, uint32_t id, uint32_t how, uint32_t number, uint32_t flags, const char *text)
{
	unsigned char payload[12 + 512];
	size_t length = strnlen(text, sizeof payload - 12);

	umm_put_u32(payload, how);
	umm_put_u32(payload + 4, number);
	umm_put_u32(payload + 8, flags);
	memcpy(payload + 12, text, length);
	umm_wire_answer(wire, UMM_FRAME_EXIT, id, payload, 12 + length);
}

static void answer_not_started(struct umm_wire *wire, uint32_t id, const struct umm_spawn_failure *failure)
{
	char text[128];

	snprintf(text, sizeof text, "%s%s%s", failure->what, failure->what[0] ? ": " : "",
	        strerror(failure->error));
	answer_exit(wire, id, UMM_EXIT_NOT_STARTED, (uint32_t)failure->error, 0, text);
}

void umm_command_start(struct umm_command *command, struct umm_wire *wire, const struct umm_frame *frame)
{
	struct umm_spawn spawn = {.in = -1, .out = -1, .err = -1, .report = -1, .terminal = -1, .cgroup = -1};
	struct umm_spawn_failure failure = {.what = "set up"};
	unsigned char pid[4];
	char **texts = NULL;
	int err = 0;

	if (command->state != UMM_COMMAND_NONE) {
		umm_wire_fault(wire, frame->id, EBUSY, "a command runs already");
		return;
	}
	uint32_t flags = 0, argc = 0;
	if (frame->length > START_HEAD) {
		flags = umm_get_u32(frame->payload);
		argc = umm_get_u32(frame->payload + 12);
		texts = parse_texts(frame, argc, umm_get_u32(frame->payload + 16), &spawn.cwd);
	}
	if (!texts) {
		umm_wire_fault(wire, frame->id, EINVAL, "START");
		return;
	}
	spawn.argv = texts;
	spawn.env = texts + argc + 1;
	command->id = frame->id;
	command->next_out = 0;
	command->in_begin = command->in_length = 0;
	command->in_ended = false;
	command->terminal = flags & UMM_START_TERMINAL;
	if (command->terminal)
		err = open_terminal(
		        command, &spawn, umm_get_u32(frame->payload + 4), umm_get_u32(frame->payload + 8));
	else
		err = open_pipes(command, &spawn, !(flags & UMM_START_NO_STDIN));
	if (!err)
		err = open_pipe(&command->out[UMM_OUT_REPORT], &spawn.report, false);
	failure.error = -err;
	if (!err) {
		command->oom_before = umm_oom_kills();
		spawn.cgroup = umm_cgroup_open();
		err = umm_spawn(&spawn, &command->pid, &failure);
	}
	close_childs_ends(&spawn);
	free(texts);
	if (err) {
		close_ends(command);
		answer_not_started(wire, frame->id, &failure);
		return;
	}
	command->state = UMM_COMMAND_RUNNING;
	umm_put_u32(pid, (uint32_t)command->pid);
	umm_wire_answer(wire, UMM_FRAME_STARTED, frame->id, pid, sizeof pid);
}

static void credit(struct umm_command *command, struct umm_wire *wire, size_t bytes)
{
	unsigned char payload[4];

	umm_put_u32(payload, (uint32_t)bytes);
	umm_wire_answer(wire, UMM_FRAME_CREDIT, command->id, payload, sizeof payload);
}

int umm_command_stdin(struct umm_command *command, struct umm_wire *wire, const struct umm_frame *frame)
{
	/* The host may not know yet that the command has ended. */
	if (command->state == UMM_COMMAND_NONE || frame->id != command->id)
		return 0;
	if (command->in < 0 || command->in_ended) {
		if (frame->length)
			credit(command, wire, frame->length);
		return 0;
	}
	const unsigned char *data = frame->payload;
	size_t length = frame->length;
	static const unsigned char end_of_file = 4; /* VEOF, which a terminal's line discipline understands */
	if (!length && command->terminal) {
		data = &end_of_file;
		length = 1;
	}
	if (length > sizeof command->in_data - command->in_length)
		return -EPROTO;
	memmove(command->in_data, command->in_data + command->in_begin, command->in_length);
	command->in_begin = 0;
	memcpy(command->in_data + command->in_length, data, length);
	command->in_length += length;
	command->in_ended = !frame->length && !command->terminal;
	umm_command_feed(command, wire);
	return 0;
}

void umm_command_feed(struct umm_command *command, struct umm_wire *wire)
{
	size_t taken = 0;

	while (command->in >= 0 && command->in_length) {
		ssize_t put = write(command->in, command->in_data + command->in_begin, command->in_length);
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0 && errno == EAGAIN)
			break;
		if (put < 0) { /* it closed its end: what comes is dropped, as by a closed pipe */
			put = (ssize_t)command->in_length;
			close_if_open(&command->in);
		}
		command->in_begin += (size_t)put;
		command->in_length -= (size_t)put;
		taken += (size_t)put;
	}
	if (taken)
		credit(command, wire, taken);
	if (command->in_ended && !command->in_length)
		close_if_open(&command->in);
}

void umm_command_signal(struct umm_command *command, const struct umm_frame *frame)
{
	if (command->state == UMM_COMMAND_RUNNING && frame->id == command->id && frame->length >= 4)
		kill(-command->pid, (int)umm_get_u32(frame->payload));
}

void umm_command_resize(struct umm_command *command, const struct umm_frame *frame)
{
	if (!command->terminal || command->out[UMM_OUT_STDOUT] < 0 || frame->length < 8)
		return;
	struct winsize size = {
	        .ws_row = (unsigned short)umm_get_u32(frame->payload),
	        .ws_col = (unsigned short)umm_get_u32(frame->payload + 4),
	};
	ioctl(command->out[UMM_OUT_STDOUT], TIOCSWINSZ, &size);
}

void umm_command_pump(struct umm_command *command, struct umm_wire *wire)
{
	for (int turn = 0; turn < UMM_OUTS; turn++) {
		int which = command->next_out;
		int *fd = &command->out[which];
		command->next_out = (which + 1) % UMM_OUTS;
		if (*fd < 0)
			continue;
		ssize_t got = read(*fd, umm_wire_data(wire), UMM_WIRE_DATA_MAX);
		if (got > 0) {
			umm_wire_send(wire, frame_types[which], command->id, (size_t)got);
			return;
		}
		if (got < 0 && (errno == EINTR || errno == EAGAIN)) {
			/* At the end a holder of the pipe that outlived the killing is not waited for. */
			if (command->state != UMM_COMMAND_ENDING || command->ending_since_ns)
				continue;
		}
		close_if_open(fd);
	}
}

static void kill_all(const struct umm_command *command, bool all)
{
	umm_cgroup_kill();
	/* For PID 1: every process but itself, under one lock. */
	if (all)
		kill(-1, SIGKILL);
	else
		kill(-command->pid, SIGKILL);
}

void umm_command_reap(struct umm_command *command, bool all)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(all ? -1 : command->pid, &status, WNOHANG)) > 0) {
		if (command->state != UMM_COMMAND_RUNNING || pid != command->pid)
			continue;
		command->status = status;
		command->state = UMM_COMMAND_ENDING;
		command->ending_since_ns = now_ns();
		close_if_open(&command->in);
		kill_all(command, all);
		if (!all)
			break;
	}
	if (command->state != UMM_COMMAND_ENDING || !command->ending_since_ns)
		return;
	/* 0 from here on: nothing writes any more, or it is not waited for any longer. */
	if (!all || (pid < 0 && errno == ECHILD) || now_ns() - command->ending_since_ns > ending_limit_ns)
		command->ending_since_ns = 0;
}

void umm_command_finish(struct umm_command *command, struct umm_wire *wire)
{
	if (command->state != UMM_COMMAND_ENDING || command->ending_since_ns || !umm_wire_is_idle(wire))
		return;
	for (int i = 0; i < UMM_OUTS; i++) {
		if (command->out[i] >= 0)
			return;
	}
	uint32_t flags = umm_oom_kills() > command->oom_before ? 2 : 0;
	if (WIFSIGNALED(command->status))
		answer_exit(wire, command->id, UMM_EXIT_SIGNAL, (uint32_t)WTERMSIG(command->status),
		        flags | (WCOREDUMP(command->status) ? 1 : 0), "");
	else
		answer_exit(wire, command->id, UMM_EXIT_STATUS, (uint32_t)WEXITSTATUS(command->status), flags,
		        "");
	command->state = UMM_COMMAND_NONE;
}

void umm_command_abandon(struct umm_command *command)
{
	if (command->state == UMM_COMMAND_RUNNING) {
		kill(-command->pid, SIGKILL);
		waitpid(command->pid, NULL, 0);
	}
	close_ends(command);
	command->state = UMM_COMMAND_NONE;
}
