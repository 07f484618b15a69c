/* System V shared memory: shmdt says nothing of a length; what it takes away stands in /proc/self/maps. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/tell.h"

#define CAUGHT __attribute__((visibility("default")))

/* A reader of /proc/self/maps, which is called where malloc and stdio may not be: numbers and words, one
 * byte at a time. */
struct reader {
	int fd;
	ssize_t at, n;
	char buffer[512];
};

/* The next byte, or -1. */
static int next(struct reader *reader)
{
	if (reader->at == reader->n) {
		do
			reader->n = read(reader->fd, reader->buffer, sizeof(reader->buffer));
		while (reader->n < 0 && errno == EINTR);
		reader->at = 0;
		if (reader->n <= 0)
			return -1;
	}
	return (unsigned char)reader->buffer[reader->at++];
}

static uint64_t number(struct reader *reader, unsigned base, int *stop)
{
	uint64_t value = 0;
	for (;;) {
		int byte = *stop = next(reader);
		int digit = byte >= '0' && byte <= '9'   ? byte - '0'
		            : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
		                                         : -1;
		if (digit < 0 || (unsigned)digit >= base)
			return value;
		value = value * base + (unsigned)digit;
	}
}

/* The end of the segment that is attached at `address`; 0: none. Its mappings lie side by side, with the
 * segment's number for an inode. */
static uint64_t segment_end(uint64_t address)
{
	struct reader reader = {.fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC)};
	uint64_t end = 0, inode = 0;
	int stop = 0;
	while (reader.fd >= 0 && stop >= 0) {
		uint64_t from = number(&reader, 16, &stop), to = number(&reader, 16, &stop);
		/* permissions, offset, device */
		for (int words = 0; words < 3 && stop >= 0; words++)
			do
				stop = next(&reader);
			while (stop >= 0 && stop != ' ');
		uint64_t number_of = stop < 0 ? 0 : number(&reader, 10, &stop);
		while (stop >= 0 && stop != '\n')
			stop = next(&reader);
		if (from == address)
			inode = number_of;
		else if (!end || from != end || number_of != inode)
			continue;
		end = to;
	}
	if (reader.fd >= 0)
		close(reader.fd);
	return end;
}

CAUGHT int shmdt(const void *address)
{
	const struct umm_teller *teller = teller_for(__builtin_return_address(0));
	struct umm_told told = {.n = 0};
	int saved = errno;
	uint64_t end = teller ? segment_end((uintptr_t)address) : 0;
	if (end) {
		told.n = 1;
		told.effects[0] = (struct umm_effect){(uintptr_t)address, end, UMM_REASON_UNMAP};
		teller->start(&told);
	}
	int error = syscall(SYS_shmdt, address) ? -errno : 0;
	if (end)
		teller->end(&told, error, 0);
	errno = error ? -error : saved;
	return error ? -1 : 0;
}
