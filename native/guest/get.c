#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/files.h"

static int by_name(const FTSENT **a, const FTSENT **b)
{
	return strcmp((*a)->fts_name, (*b)->fts_name);
}

void umm_get_begin(struct umm_get *get, struct umm_wire *wire, const struct umm_frame *frame)
{
	const char *at = (const char *)frame->payload, *end = at + frame->length;
	int flags = GLOB_BRACE;

	if (!frame->length || end[-1]) {
		umm_wire_fault(wire, frame->id, EINVAL, "GET");
		return;
	}
	*get = (struct umm_get){.active = true, .id = frame->id, .fd = -1};
	for (; at < end; at += strlen(at) + 1) {
		int error = *at ? glob(at, flags, NULL, &get->found) : GLOB_NOMATCH;
		if (error && error != GLOB_NOMATCH) {
			umm_wire_fault(wire, get->id, error == GLOB_NOSPACE ? ENOMEM : EIO, at);
			umm_get_end(get);
			return;
		}
		flags |= GLOB_APPEND;
	}
	if (!get->found.gl_pathc)
		return;
	/* What a pattern names itself is followed when it is a symbolic link; links to folders below are not.
	 */
	get->walk = fts_open(get->found.gl_pathv, FTS_PHYSICAL | FTS_COMFOLLOW | FTS_NOCHDIR, by_name);
	if (!get->walk) {
		umm_wire_fault(wire, get->id, errno, "GET");
		umm_get_end(get);
	}
}

void umm_get_end(struct umm_get *get)
{
	if (!get->active)
		return;
	if (get->walk)
		fts_close(get->walk);
	if (get->fd >= 0)
		close(get->fd);
	globfree(&get->found);
	get->active = false;
}

static void send_end(struct umm_get *get, struct umm_wire *wire, int error)
{
	unsigned char *payload = umm_wire_data(wire);

	umm_put_u32(payload, get->crc);
	umm_put_u32(payload + 4, (uint32_t)error);
	umm_wire_send(wire, UMM_FRAME_FILE_END, get->id, 8);
	if (get->fd >= 0)
		close(get->fd);
	get->fd = -1;
}

static void send_data(struct umm_get *get, struct umm_wire *wire)
{
	ssize_t got;

	do {
		got = read(get->fd, umm_wire_data(wire), UMM_WIRE_DATA_MAX);
	} while (got < 0 && errno == EINTR);
	if (got <= 0) {
		send_end(get, wire, got < 0 ? errno : 0);
		return;
	}
	get->crc = umm_crc32(get->crc, umm_wire_data(wire), (size_t)got);
	umm_wire_send(wire, UMM_FRAME_FILE_DATA, get->id, (size_t)got);
}

/* FILE; an error that the file has already is told by the FILE_END, which is sent as an answer because the
 * wire is taken. */
static void send_file(struct umm_get *get, struct umm_wire *wire, const FTSENT *entry, int error)
{
	unsigned char *payload = umm_wire_data(wire);
	struct stat status = {0};
	size_t length = strnlen(entry->fts_path, PATH_MAX);

	get->crc = 0;
	get->files++;
	if (!error && stat(entry->fts_accpath, &status))
		error = errno;
	/* To open a device may do something, to open a pipe waits for its other end. */
	if (!error && !S_ISREG(status.st_mode))
		error = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
	if (!error) {
		get->fd = open(entry->fts_accpath, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
		if (get->fd < 0)
			error = errno;
	}
	umm_put_u32(payload, status.st_mode);
	umm_put_u64(payload + 4, (uint64_t)status.st_size);
	memcpy(payload + 12, entry->fts_path, length);
	umm_wire_send(wire, UMM_FRAME_FILE, get->id, 12 + length);
	if (error) {
		unsigned char end[8] = {0};
		umm_put_u32(end + 4, (uint32_t)error);
		umm_wire_answer(wire, UMM_FRAME_FILE_END, get->id, end, sizeof end);
	}
}

void umm_get_step(struct umm_get *get, struct umm_wire *wire)
{
	FTSENT *entry;

	if (get->fd >= 0) {
		send_data(get, wire);
		return;
	}
	while (get->walk && (entry = fts_read(get->walk))) {
		struct stat status;
		switch (entry->fts_info) {
		case FTS_D:
		case FTS_DP:
		case FTS_DC:
		case FTS_DOT:
			continue;
		case FTS_SL:
			if (!stat(entry->fts_accpath, &status) && S_ISDIR(status.st_mode))
				continue;
			send_file(get, wire, entry, 0);
			return;
		case FTS_DNR:
		case FTS_ERR:
		case FTS_NS:
			send_file(get, wire, entry, entry->fts_errno);
			return;
		default:
			send_file(get, wire, entry, 0);
			return;
		}
	}
	umm_put_u32(umm_wire_data(wire), get->files);
	umm_wire_send(wire, UMM_FRAME_GOT, get->id, 4);
	umm_get_end(get);
}
