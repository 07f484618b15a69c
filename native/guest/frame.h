/* Frames between the host and the agent in a guest, over a virtio-serial port (any byte stream will do).
 *
 * A frame is a header of 24 bytes, little endian, and `length` bytes of payload. `crc` is CRC-32 (as zlib's)
 * of the header's other 20 bytes and the payload; `sequence` counts the frames of one direction from 0. A
 * frame that is damaged, too long or out of order ends the conversation: the stream below does not lose
 * bytes, so something is wrong that a repetition would not mend. uspace_mm/guest/channel.py is the other side
 * of this file.
 *
 * The agent says HELLO once it has set the guest up. Then the host sends commands, one at a time: PUT* START,
 * then STDIN, SIGNAL and RESIZE while it runs; the agent answers STARTED, STDOUT, STDERR and REPORT in any
 * order, and EXIT as the last after all output was sent. GET after EXIT brings files back. PING may come at
 * any time and is answered at once by PONG, whatever the command does.
 *
 * Texts are UTF-8, lists of texts are NUL-terminated texts one after the other. Numbers in payloads are
 * little endian.
 */
#ifndef UMM_GUEST_FRAME_H
#define UMM_GUEST_FRAME_H

#include <stdint.h>

enum {
	UMM_FRAME_MAGIC = 0x314d4d55, /* "UMM1" */
	UMM_FRAME_HEADER = 24,
	UMM_FRAME_PAYLOAD_MAX = 1 << 20,
	UMM_AGENT_PROTOCOL = 1,
	/* What the agent keeps for a command that does not read: were it to stop reading the channel instead,
	 * a PING would go unanswered. */
	UMM_STDIN_WINDOW = 256 << 10,
};

struct umm_frame_header {
	uint32_t magic;
	uint32_t type;   /* enum umm_frame_type */
	uint32_t length; /* of the payload, at most UMM_FRAME_PAYLOAD_MAX */
	uint32_t id;     /* of the command or transfer it belongs to, chosen by the host; 0 for none */
	uint32_t sequence;
	uint32_t crc;
};

enum umm_frame_type {
	/* from the agent */
	UMM_FRAME_HELLO = 1,   /* text: lines NAME=VALUE: protocol, page_size (AT_PAGESZ), release, machine,
	                          cpus, memory, pvpanic (1: the kernel tells
	                          QEMU of a panic) */
	UMM_FRAME_STARTED = 2, /* u32 pid */
	UMM_FRAME_STDOUT = 3,  /* bytes */
	UMM_FRAME_STDERR = 4,
	UMM_FRAME_REPORT =
	        5, /* bytes that the command wrote to descriptor UMM_REPORT_FD of its environment */
	UMM_FRAME_EXIT =
	        6, /* u32 how (enum umm_exit), u32 status, signal or errno, u32 flags (1 core, 2 OOM), text */
	UMM_FRAME_FILE = 7,      /* u32 mode, u64 size, text path: a file of the GET begins */
	UMM_FRAME_FILE_DATA = 8, /* bytes of the file begun last */
	UMM_FRAME_FILE_END = 9,  /* u32 CRC-32 of the whole file, u32 errno (0: it was read to its end) */
	UMM_FRAME_GOT = 10,      /* u32 number of files: the GET is done */
	UMM_FRAME_PONG = 11,     /* the payload of the PING */
	UMM_FRAME_FAULT = 12,    /* u32 errno, text: the request of this id failed, the conversation goes on;
	                            with id 0 before HELLO: the guest could not be set up */
	UMM_FRAME_CREDIT = 13, /* u32 bytes of STDIN that the command has taken, or that were dropped because
	                          it closed its end */
	/* from the host */
	UMM_FRAME_START = 32, /* u32 flags (enum umm_start), u32 rows, u32 columns, u32 argc, u32 envc, texts:
	                         cwd, argv, env */
	UMM_FRAME_STDIN = 33, /* bytes, at most UMM_STDIN_WINDOW without CREDIT; an empty one is the end */
	UMM_FRAME_SIGNAL = 34, /* u32 signal, to the command's process group */
	UMM_FRAME_RESIZE = 35, /* u32 rows, u32 columns */
	UMM_FRAME_PUT = 36, /* u32 mode, u64 size, text path: a file for the guest begins; folders are made */
	UMM_FRAME_PUT_DATA = 37,
	UMM_FRAME_PUT_END = 38, /* u32 CRC-32 of the whole file; answered by GOT or FAULT */
	UMM_FRAME_GET = 39,     /* texts: glob patterns of files wanted back; FILE... and GOT answer */
	UMM_FRAME_PING = 40,    /* bytes */
	UMM_FRAME_CLOCK = 41,   /* u64 nanoseconds since the epoch, then bytes of entropy: after a saved state
	                           was resumed */
	UMM_FRAME_POWER_OFF = 42, /* sync file systems and power off */
};

enum umm_start {
	UMM_START_TERMINAL = 1, /* of rows and columns; its output is STDOUT */
	UMM_START_NO_STDIN = 2, /* /dev/null */
};

enum umm_exit {
	UMM_EXIT_STATUS = 0,
	UMM_EXIT_SIGNAL = 1,
	UMM_EXIT_NOT_STARTED = 2, /* errno of execve, chdir or the like, and which */
};

#endif
