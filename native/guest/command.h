/* The command that the host asked for: started, fed, listened to, and ended with all that it left behind. */
#ifndef UMM_GUEST_COMMAND_H
#define UMM_GUEST_COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "guest/wire.h"

enum { UMM_REPORT_DESCRIPTOR = 9 }; /* the highest that a shell can write in a redirection */

enum umm_command_state {
	UMM_COMMAND_NONE,
	UMM_COMMAND_RUNNING,
	UMM_COMMAND_ENDING, /* it was waited for: the rest of it is killed, its output drained */
};

enum { UMM_OUT_STDOUT, UMM_OUT_STDERR, UMM_OUT_REPORT, UMM_OUTS };

struct umm_command {
	enum umm_command_state state;
	uint32_t id;
	pid_t pid;
	int status;        /* as of waitpid(2) */
	int out[UMM_OUTS]; /* our ends, non-blocking; -1 closed */
	int next_out;      /* in turn, so that a flood on one does not hide the others */
	bool terminal;
	int in; /* our end of its stdin; -1 closed */
	bool in_ended;
	size_t in_begin, in_length;
	uint64_t oom_before;
	uint64_t ending_since_ns; /* while others may still write to its pipes, then 0 */
	unsigned char in_data[UMM_STDIN_WINDOW];
};

void umm_command_init(struct umm_command *command);

/* A START frame: STARTED, or EXIT with UMM_EXIT_NOT_STARTED, or FAULT is queued. */
void umm_command_start(struct umm_command *command, struct umm_wire *wire, const struct umm_frame *frame);
/* A STDIN frame. -EPROTO when the host does not keep to the window. */
int umm_command_stdin(struct umm_command *command, struct umm_wire *wire, const struct umm_frame *frame);
void umm_command_signal(struct umm_command *command, const struct umm_frame *frame);
void umm_command_resize(struct umm_command *command, const struct umm_frame *frame);

/* Write to its stdin what it takes now. */
void umm_command_feed(struct umm_command *command, struct umm_wire *wire);
/* Send one frame of its output, when there is any now. */
void umm_command_pump(struct umm_command *command, struct umm_wire *wire);
/* Reap children; `all` is true in PID 1, whom everything left behind falls to. */
void umm_command_reap(struct umm_command *command, bool all);
/* Queue EXIT once nothing runs and all output was sent. */
void umm_command_finish(struct umm_command *command, struct umm_wire *wire);
/* Kill it and forget it: the host went away. */
void umm_command_abandon(struct umm_command *command);

#endif
