#include "kernel/procmap.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct query_arg {
	uint64_t size, flags, address, start, end, mapping_flags, page_size, offset, inode;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name_address, build_id_address;
};
#define PROCMAP_QUERY_ARG _IOWR('f', 17, struct query_arg)
_Static_assert(sizeof(struct query_arg) == 104, "struct procmap_query");

static int find_in_text(int fd, uint64_t address, uint64_t *start, uint64_t *end)
{
	FILE *file = fdopen(fd, "r");
	if (!file) {
		int error = errno;
		close(fd);
		return -error;
	}
	char line[512];
	int err = -ENOENT;
	while (err && fgets(line, sizeof(line), file)) {
		/* A long name comes in pieces, which hardly look like this. */
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", start, end) == 2 && *start <= address &&
		        address < *end)
			err = 0;
	}
	fclose(file);
	return err;
}

int umm_procmap_find(uint64_t address, uint64_t *start, uint64_t *end)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	struct query_arg arg = {.size = sizeof(arg), .address = address};
	int err = ioctl(fd, PROCMAP_QUERY_ARG, &arg) ? -errno : 0;
	if (err == -ENOTTY)
		return find_in_text(fd, address, start, end);
	close(fd);
	if (err)
		return err;
	*start = arg.start;
	*end = arg.end;
	return 0;
}
