#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/files.h"

static void make_parents(char *path)
{
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		mkdir(path, 0755); /* what is wrong with it, opening the file will say */
		*slash = '/';
	}
}

int umm_put_begin(struct umm_put *put, const struct umm_frame *frame)
{
	size_t length =
	        frame->length > 12 ? strnlen((const char *)frame->payload + 12, frame->length - 12) : 0;

	if (put->active || !length)
		return -EPROTO;
	put->active = true;
	put->fd = -1;
	put->crc = 0;
	put->error = 0;
	put->mode = umm_get_u32(frame->payload) & 07777;
	put->left = umm_get_u64(frame->payload + 4);
	if (length >= sizeof put->path) {
		put->error = ENAMETOOLONG;
		snprintf(put->path, sizeof put->path, "a path of %zu bytes", length);
		return 0;
	}
	memcpy(put->path, frame->payload + 12, length);
	put->path[length] = '\0';
	make_parents(put->path);
	/* Not to wait for the other end of a pipe of that name. */
	put->fd = open(put->path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0600);
	if (put->fd < 0)
		put->error = errno;
	return 0;
}

int umm_put_data(struct umm_put *put, const struct umm_frame *frame)
{
	if (!put->active || frame->length > put->left)
		return -EPROTO;
	put->left -= frame->length;
	put->crc = umm_crc32(put->crc, frame->payload, frame->length);
	for (size_t done = 0; done < frame->length && !put->error;) {
		ssize_t written = write(put->fd, frame->payload + done, frame->length - done);
		if (written >= 0)
			done += (size_t)written;
		else if (errno != EINTR)
			put->error = errno;
	}
	return 0;
}

int umm_put_end(struct umm_put *put, struct umm_wire *wire, const struct umm_frame *frame)
{
	unsigned char one[4] = {1};

	if (!put->active || frame->length != 4 || put->left)
		return -EPROTO;
	if (umm_get_u32(frame->payload) != put->crc)
		return -EBADMSG;
	if (!put->error && fchmod(put->fd, put->mode))
		put->error = errno;
	if (put->fd >= 0 && close(put->fd) && !put->error)
		put->error = errno;
	if (put->error) {
		if (put->fd >= 0)
			unlink(put->path); /* half a file is worse than none */
		umm_wire_fault(wire, frame->id, put->error, put->path);
	} else {
		umm_wire_answer(wire, UMM_FRAME_GOT, frame->id, one, sizeof one);
	}
	put->active = false;
	return 0;
}

void umm_put_abandon(struct umm_put *put)
{
	if (put->active && put->fd >= 0)
		close(put->fd);
	put->active = false;
}
