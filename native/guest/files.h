/* Files that go into the guest (PUT) and come back (GET). */
#ifndef UMM_GUEST_FILES_H
#define UMM_GUEST_FILES_H

#include <fts.h>
#include <glob.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "guest/wire.h"

/* The GET under way: a walk over what the patterns match. */
struct umm_get {
	bool active;
	uint32_t id;
	uint32_t files;
	glob_t found;
	FTS *walk;
	int fd; /* of the file being sent, -1 between files */
	uint32_t crc;
};

/* The PUT under way. After an error the rest of it is swallowed, and FAULT sent at its end. */
struct umm_put {
	bool active;
	int fd;
	int error;
	uint32_t crc;
	uint32_t mode;
	uint64_t left; /* bytes announced and not yet received */
	char path[PATH_MAX];
};

void umm_get_begin(struct umm_get *get, struct umm_wire *wire, const struct umm_frame *frame);
/* Send the next frame of it: call when the wire is idle. */
void umm_get_step(struct umm_get *get, struct umm_wire *wire);
void umm_get_end(struct umm_get *get);

/* -EPROTO when the frames do not fit together. */
int umm_put_begin(struct umm_put *put, const struct umm_frame *frame);
int umm_put_data(struct umm_put *put, const struct umm_frame *frame);
int umm_put_end(struct umm_put *put, struct umm_wire *wire, const struct umm_frame *frame);
void umm_put_abandon(struct umm_put *put);

#endif
