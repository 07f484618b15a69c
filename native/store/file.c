/* A store in a file: plain bytes at an offset, read with pread(2), written back with pwrite(2). */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/store.h"

struct file_store {
	struct umm_store base;
	int fd, direct;
	uint64_t offset;
};

/* O_DIRECT wants whole blocks: the last block of a file is asked for whole and comes back short. */
static const uint64_t direct_block = 4096; /* no page size: that of disks */

static int file_fetch(struct umm_store *store, uint64_t offset, uint64_t len, void *buf)
{
	struct file_store *file = (struct file_store *)store;
	uint64_t want = file->direct ? (len + direct_block - 1) / direct_block * direct_block : len;
	uint64_t done = 0;
	while (done < len) {
		ssize_t n = pread(
		        file->fd, (uint8_t *)buf + done, want - done, (off_t)(file->offset + offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA; /* the file became shorter than it was */
		done += (uint64_t)n;
	}
	return 0;
}

static int write_fully(int fd, const uint8_t *buf, uint64_t len, uint64_t offset)
{
	for (uint64_t done = 0; done < len;) {
		ssize_t n = pwrite(fd, buf + done, len - done, (off_t)(offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (uint64_t)n;
	}
	return 0;
}

static int file_write(struct umm_store *store, uint64_t offset, uint64_t len, const void *buf)
{
	struct file_store *file = (struct file_store *)store;
	uint64_t whole = file->direct ? len / direct_block * direct_block : len;
	int err = write_fully(file->fd, buf, whole, file->offset + offset);
	if (err || whole == len)
		return err;
	/* The tail of a file that is no whole block cannot be written with O_DIRECT. */
	int flags = fcntl(file->fd, F_GETFL);
	if (flags < 0 || fcntl(file->fd, F_SETFL, flags & ~O_DIRECT) < 0)
		return -errno;
	err = write_fully(file->fd, (const uint8_t *)buf + whole, len - whole, file->offset + offset + whole);
	if (fcntl(file->fd, F_SETFL, flags) < 0 && !err)
		err = -errno;
	return err;
}

static int file_flush(struct umm_store *store)
{
	return fdatasync(((struct file_store *)store)->fd) < 0 ? -errno : 0;
}

static void file_destroy(struct umm_store *store)
{
	close(((struct file_store *)store)->fd);
	free(store);
}

static const struct umm_store_ops file_ops = {
        .name = "file",
        .fetch = file_fetch,
        .write = file_write,
        .flush = file_flush,
        .destroy = file_destroy,
};

int umm_store_file_create(
        int fd, uint64_t offset, uint64_t size, int kind, int direct, struct umm_store **ret)
{
	if (!size || kind < UMM_STORE_PRIVATE || kind > UMM_STORE_WRITEBACK ||
	        (direct && offset % direct_block))
		return -EINVAL;
	struct file_store *file = calloc(1, sizeof(*file));
	if (!file)
		return -ENOMEM;
	file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (file->fd < 0) {
		int err = -errno;
		free(file);
		return err;
	}
	umm_store_init(&file->base, &file_ops, kind, size);
	file->direct = direct;
	file->offset = offset;
	*ret = &file->base;
	return 0;
}
