#include "guest/cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOT "/sys/fs/cgroup"
#define GROUP ROOT "/command"

/* What the command may not take: the agent, the channel's buffers and the kernel's own work live on it. */
static const uint64_t reserve_min = 32 << 20;
enum { RESERVE_PART = 32 };
/* Of the least process: its page tables, its stacks, what it writes. More of them than fit would have the
 * kernel look for memory for minutes. */
enum { PAGES_PER_PROCESS = 16, PROCESSES_MIN = 512 };

static bool write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	bool ok = write(fd, text, strlen(text)) >= 0;
	close(fd);
	return ok;
}

static uint64_t number_in(const char *path, const char *name)
{
	char line[128];
	uint64_t value = 0;
	size_t length = strlen(name);

	FILE *file = fopen(path, "re");
	if (!file)
		return 0;
	while (fgets(line, sizeof line, file)) {
		if (!strncmp(line, name, length)) {
			value = strtoull(line + length, NULL, 10);
			break;
		}
	}
	fclose(file);
	return value;
}

void umm_cgroup_init(void)
{
	/* One by one: a kernel that lacks one refuses them all. */
	static const char *const controllers[] = {"+memory", "+pids", "+cpu", "+hugetlb", "+io"};
	for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++)
		write_text(ROOT "/cgroup.subtree_control", controllers[i]);
}

int umm_cgroup_open(void)
{
	char text[32];

	/* The memory of the old group's dead pages is not counted against the new one. */
	rmdir(GROUP);
	if (mkdir(GROUP, 0755) && errno != EEXIST)
		return -1;
	uint64_t memory = number_in("/proc/meminfo", "MemTotal:") << 10;
	if (memory) {
		uint64_t reserve = memory / RESERVE_PART > reserve_min ? memory / RESERVE_PART : reserve_min;
		uint64_t limit = memory - reserve;
		/* Nor what others have taken already: in a small guest with large pages the kernel itself has
		 * more than the reserve, and without this the machine would thrash before the command meets
		 * its limit. */
		uint64_t available = number_in("/proc/meminfo", "MemAvailable:") << 10;
		if (available > 2 * reserve_min && available - reserve_min / 2 < limit)
			limit = available - reserve_min / 2;
		snprintf(text, sizeof text, "%llu", (unsigned long long)limit);
		if (memory > 2 * reserve)
			write_text(GROUP "/memory.max", text);
		uint64_t processes = memory / PAGES_PER_PROCESS / getauxval(AT_PAGESZ);
		if (processes < PROCESSES_MIN)
			processes = PROCESSES_MIN;
		snprintf(text, sizeof text, "%llu", (unsigned long long)processes);
		write_text(GROUP "/pids.max", text);
	}
	return open(GROUP "/cgroup.procs", O_WRONLY | O_CLOEXEC);
}

void umm_cgroup_kill(void)
{
	write_text(GROUP "/cgroup.kill", "1");
}

uint64_t umm_oom_kills(void)
{
	return number_in("/proc/vmstat", "oom_kill ");
}
