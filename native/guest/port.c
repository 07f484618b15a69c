#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "guest/setup.h"

static const time_t appear_s = 10;

/* Without udev the names of the ports are in sysfs only; they come from the host in messages of their own. */
static bool find_port(const char *wanted, char *device, size_t size)
{
	char path[300], name[64];
	bool found = false;
	struct dirent *entry;

	DIR *ports = opendir("/sys/class/virtio-ports");
	if (!ports)
		return false;
	while (!found && (entry = readdir(ports))) {
		snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t got = fd < 0 ? -1 : read(fd, name, sizeof name - 1);
		if (fd >= 0)
			close(fd);
		if (got <= 0)
			continue;
		name[got] = '\0';
		name[strcspn(name, "\n")] = '\0';
		found = !strcmp(name, wanted);
		if (found)
			snprintf(device, size, "/dev/%s", entry->d_name);
	}
	closedir(ports);
	return found;
}

/* Until the host's end is known to be open, a read would say that it is closed. */
static bool host_is_there(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLOUT};

	return poll(&polled, 1, 0) > 0 && !(polled.revents & POLLHUP) && (polled.revents & POLLOUT);
}

int umm_open_port(const char *name, struct umm_setup_failure *failure)
{
	char device[300] = "";
	struct timespec now, begin;
	int fd = -1;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (;;) {
		if (fd < 0 && find_port(name, device, sizeof device))
			fd = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
		if (fd >= 0 && host_is_there(fd))
			return fd;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec - begin.tv_sec > appear_s) {
			errno = ENODEV;
			return umm_setup_fail(failure, "the virtio-serial port %s", name);
		}
		umm_rest();
	}
}
