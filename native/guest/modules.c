#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest/setup.h"

static int load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	/* MODULE_INIT_COMPRESSED_FILE: .ko.xz and .ko.zst are the kernel's to unpack. */
	const char *dot = strrchr(path, '.');
	unsigned flags = dot && strcmp(dot, ".ko") ? 4 : 0;
	long result = syscall(SYS_finit_module, fd, "", flags);
	int error = errno;
	close(fd);
	return result && error != EEXIST ? -error : 0;
}

int umm_load_modules(struct umm_setup_failure *failure)
{
	char path[512] = "/modules/";
	const size_t folder = strlen(path);

	FILE *order = fopen("/modules/order", "re");
	if (!order)
		return 0; /* everything is built in */
	int err = 0;
	while (!err && fgets(path + folder, (int)(sizeof path - folder), order)) {
		path[strcspn(path, "\n")] = '\0';
		if (!path[folder])
			continue;
		err = load(path);
		if (err) {
			errno = -err;
			umm_setup_fail(failure, "loading the module %s", path + folder);
		}
	}
	fclose(order);
	return err;
}
