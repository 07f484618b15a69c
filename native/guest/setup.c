#include "guest/setup.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guest/cgroup.h"

struct mount_point {
	const char *source, *target, *type, *data;
	unsigned long flags;
	mode_t mode;
	bool needed;
};

static const struct mount_point early_mounts[] = {
        {"proc", "/proc", "proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0555, true},
        {"sysfs", "/sys", "sysfs", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0555, true},
        {"devtmpfs", "/dev", "devtmpfs", "mode=755", MS_NOSUID, 0755, true},
};

/* The rest is what the kernel has. /tmp and /dev/shm lie on the writable layer, so that one limit holds for
 * all; without layers they are file systems of their own. */
static const struct mount_point late_mounts[] = {
        {"devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666", MS_NOSUID | MS_NOEXEC, 0755, false},
        {"cgroup2", "/sys/fs/cgroup", "cgroup2", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0755, false},
        {"tracefs", "/sys/kernel/tracing", "tracefs", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0, false},
        {"debugfs", "/sys/kernel/debug", "debugfs", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 0, false},
        {"hugetlbfs", "/dev/hugepages", "hugetlbfs", NULL, MS_NOSUID | MS_NODEV, 0755, false},
        {"mqueue", "/dev/mqueue", "mqueue", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC, 01777, false},
};

static const struct mount_point bare_mounts[] = {
        {"tmp", "/tmp", "tmpfs", "mode=1777,size=25%", MS_NOSUID | MS_NODEV, 01777, false},
        {"shm", "/dev/shm", "tmpfs", "mode=1777,size=25%", MS_NOSUID | MS_NODEV, 01777, false},
};

int umm_setup_fail(struct umm_setup_failure *failure, const char *format, ...)
{
	va_list args;

	failure->error = errno;
	va_start(args, format);
	vsnprintf(failure->what, sizeof failure->what, format, args);
	va_end(args);
	return -failure->error;
}

unsigned long long umm_setup_option(const char *name)
{
	char line[2048 + 1];
	size_t length = strlen(name);

	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
	if (fd >= 0)
		close(fd);
	line[got < 0 ? 0 : got] = '\0';
	for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
		if (!strncmp(word, name, length) && word[length] == '=')
			return strtoull(word + length + 1, NULL, 10);
	}
	return 0;
}

void umm_say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vdprintf(STDERR_FILENO, format, args);
	va_end(args);
}

void umm_rest(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
}

static int mount_all(const struct mount_point *points, size_t count, struct umm_setup_failure *failure)
{
	for (const struct mount_point *point = points; point < points + count; point++) {
		if (point->mode)
			mkdir(point->target, point->mode);
		/* EBUSY: the kernel mounted devtmpfs itself. */
		if (mount(point->source, point->target, point->type, point->flags, point->data) &&
		        errno != EBUSY && point->needed)
			return umm_setup_fail(failure, "mounting %s on %s", point->type, point->target);
	}
	return 0;
}

static void bring_loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};

	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		ioctl(fd, SIOCSIFFLAGS, &request);
		close(fd);
	}
}

static void link_descriptors(void)
{
	(void)!symlink("/proc/self/fd", "/dev/fd");
	(void)!symlink("fd/0", "/dev/stdin");
	(void)!symlink("fd/1", "/dev/stdout");
	(void)!symlink("fd/2", "/dev/stderr");
}

int umm_setup_early(struct umm_setup_failure *failure)
{
	int err = mount_all(early_mounts, sizeof early_mounts / sizeof *early_mounts, failure);
	return err ? err : umm_load_modules(failure);
}

int umm_setup_root(struct umm_setup_failure *failure)
{
	int err = umm_enter_layers(failure);
	if (err)
		return err;
	mkdir("/dev/shm", 01777);
	if (!umm_setup_option("umm.layers"))
		mount_all(bare_mounts, sizeof bare_mounts / sizeof *bare_mounts, failure);
	mount_all(late_mounts, sizeof late_mounts / sizeof *late_mounts, failure);
	link_descriptors();
	umm_cgroup_init();
	static const char name[] = "guest";
	(void)!sethostname(name, sizeof name - 1);
	bring_loopback_up();
	return 0;
}
