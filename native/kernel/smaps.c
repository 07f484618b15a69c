#include "kernel/smaps.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Two letters between spaces: " rd wr mr dc " */
static bool has_flag(const char *line, const char *flag)
{
	for (const char *at = strchr(line, ':'); at && at[1]; at = strchr(at + 1, ' '))
		if (strncmp(at + 1, flag, 2) == 0)
			return true;
	return false;
}

int umm_smaps_walk(int (*each)(void *context, const struct umm_smaps_mapping *mapping), void *context)
{
	FILE *file = fopen("/proc/self/smaps", "re");
	if (!file)
		return -errno;
	struct umm_smaps_mapping mapping = {0};
	char *line = NULL;
	size_t capacity = 0;
	int result = 0;
	while (!result && getline(&line, &capacity, file) > 0) {
		uint64_t start, end;
		/* A mapping's first line begins with its range, the others with a name and a colon. */
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &start, &end) == 2) {
			mapping = (struct umm_smaps_mapping){.start = start, .end = end};
		} else if (strncmp(line, "VmFlags:", 8) == 0) {
			mapping.shared = has_flag(line, "sh");
			mapping.dont_fork = has_flag(line, "dc");
			result = each(context, &mapping);
		}
	}
	if (!result && ferror(file))
		result = -EIO;
	free(line);
	fclose(file);
	return result;
}
