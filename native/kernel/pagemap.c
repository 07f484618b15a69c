#include "kernel/pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <unistd.h>

_Static_assert(sizeof(struct umm_pagemap_scan) == 12 * sizeof(uint64_t), "struct pm_scan_arg");

#define IO_PAGEMAP_SCAN _IOWR('f', 16, struct umm_pagemap_scan)
_Static_assert(IO_PAGEMAP_SCAN == 0xC0606610, "PAGEMAP_SCAN");

enum { PATH_BYTES = 32 };

/* "/proc/<pid>/pagemap" without stdio. */
static void pagemap_path(int pid, char path[PATH_BYTES])
{
	char digits[12];
	int count = 0;
	for (unsigned rest = (unsigned)pid; rest || !count; rest /= 10)
		digits[count++] = (char)('0' + rest % 10);
	char *to = path;
	for (const char *from = "/proc/"; *from; from++)
		*to++ = *from;
	while (count)
		*to++ = digits[--count];
	for (const char *from = "/pagemap"; *from; from++)
		*to++ = *from;
	*to = '\0';
}

int umm_pagemap_open(int pid)
{
	char path[PATH_BYTES] = "/proc/self/pagemap";
	if (pid < 0)
		return -EINVAL;
	if (pid)
		pagemap_path(pid, path);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

int umm_pagemap_read(int fd, uint64_t address, uint64_t pages, uint64_t page_size, uint64_t *entries)
{
	if (!page_size || address % page_size)
		return -EINVAL;
	char *to = (char *)entries;
	uint64_t left = pages * sizeof(*entries);
	off_t at = (off_t)(address / page_size * sizeof(*entries));
	while (left) {
		ssize_t got = pread(fd, to, left, at);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got == 0)
			return -EIO;
		to += got;
		at += got;
		left -= (uint64_t)got;
	}
	return 0;
}

/* The kernel leaves walk_end where an inner round stopped (each fills a buffer of 512 regions) when the last
 * round then runs through (seen on 6.18): going on there would find regions a second time. It is then behind
 * the last region in vec. A walk_end that is not, is right: it also marks a hugetlb page that was left out
 * because the range or max_pages cuts it. */
static void correct_walk_end(struct umm_pagemap_scan *args, uint64_t regions, uint64_t page_size)
{
	const struct umm_page_region *vec = (const void *)(uintptr_t)args->vec;
	uint64_t bytes = 0;
	if (!regions || vec[regions - 1].end <= args->walk_end)
		return;
	for (uint64_t i = 0; i < regions && args->max_pages; i++)
		bytes += vec[i].end - vec[i].start;
	bool all = regions < args->vec_len && (!args->max_pages || bytes / page_size < args->max_pages);
	args->walk_end = all ? args->end : vec[regions - 1].end;
}

int umm_pagemap_scan(int fd, struct umm_pagemap_scan *args)
{
	args->size = sizeof(*args);
	args->walk_end = args->start;
	int regions = ioctl(fd, IO_PAGEMAP_SCAN, args);
	if (regions < 0)
		return -errno;
	correct_walk_end(args, (uint64_t)regions, (uint64_t)sysconf(_SC_PAGESIZE));
	return regions;
}
