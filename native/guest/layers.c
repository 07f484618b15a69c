#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "guest/setup.h"

enum { LAYERS_MAX = 16 };
/* Disks are there before init, unless a module brings them. */
static const time_t appear_s = 10;

static bool read_line(const char *path, char *line, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t got = read(fd, line, size - 1);
	close(fd);
	if (got < 0)
		return false;
	line[got] = '\0';
	line[strcspn(line, "\n")] = '\0';
	return true;
}

/* The disk whose serial is layerN: its place in /dev depends on the order of the probing. */
static bool find_disk(unsigned number, char *device, size_t size)
{
	char wanted[16], serial[32], path[300];
	bool found = false;
	struct dirent *entry;

	snprintf(wanted, sizeof wanted, "layer%u", number);
	DIR *disks = opendir("/sys/block");
	if (!disks)
		return false;
	while (!found && (entry = readdir(disks))) {
		snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
		found = !strncmp(entry->d_name, "vd", 2) && read_line(path, serial, sizeof serial) &&
		        !strcmp(serial, wanted);
		if (found)
			snprintf(device, size, "/dev/%s", entry->d_name);
	}
	closedir(disks);
	return found;
}

static int mount_layer(unsigned number, const char *target, struct umm_setup_failure *failure)
{
	static const char *const types[] = {"squashfs", "erofs"};
	char device[300] = "";
	struct timespec now, begin;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (!find_disk(number, device, sizeof device) || access(device, R_OK)) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec - begin.tv_sec > appear_s) {
			errno = ENODEV;
			return umm_setup_fail(failure, "the disk of layer %u", number);
		}
		umm_rest();
	}
	for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
		if (!mount(device, target, types[i], MS_RDONLY | MS_NOATIME, NULL))
			return 0;
		/* EINVAL: not of this type; ENODEV: the kernel does not know the type. */
		if (errno != EINVAL && errno != ENODEV)
			break;
	}
	return umm_setup_fail(failure, "mounting layer %u (%s) as squashfs or erofs", number, device);
}

static int make_overlay(unsigned count, struct umm_setup_failure *failure)
{
	char options[64 * LAYERS_MAX] = "upperdir=/rw/upper,workdir=/rw/work,lowerdir=";
	char size[64];

	/* Below what the command may use in memory: a full disk has to be ENOSPC, not a kill. */
	unsigned long long limit = umm_setup_option("umm.disk");
	if (limit)
		snprintf(size, sizeof size, "mode=755,size=%llu", limit);
	else
		snprintf(size, sizeof size, "mode=755,size=50%%");
	mkdir("/rw", 0755);
	mkdir("/root", 0755);
	mkdir("/layers", 0755);
	if (mount("rw", "/rw", "tmpfs", MS_NOATIME, size))
		return umm_setup_fail(failure, "mounting tmpfs for what is written");
	mkdir("/rw/upper", 0755);
	mkdir("/rw/work", 0755);
	mkdir("/rw/tmp", 01777);
	mkdir("/rw/shm", 01777);
	/* The umask was at work. */
	chmod("/rw/tmp", 01777);
	chmod("/rw/shm", 01777);
	for (unsigned i = count; i--;) {
		char target[32];
		snprintf(target, sizeof target, "/layers/%u", i);
		mkdir(target, 0755);
		int err = mount_layer(i, target, failure);
		if (err)
			return err;
		strcat(options, target);
		if (i)
			strcat(options, ":");
	}
	if (mount("overlay", "/root", "overlay", MS_NOATIME, options))
		return umm_setup_fail(failure, "mounting the overlay");
	return 0;
}

static void move_to(const char *from, const char *to)
{
	mkdir(to, 0755);
	if (mount(from, to, NULL, MS_MOVE, NULL))
		umm_say("agent: moving %s to %s: %s\n", from, to, strerror(errno));
}

static void bind_to(const char *from, const char *to)
{
	mkdir(to, 01777);
	if (mount(from, to, NULL, MS_BIND, NULL))
		umm_say("agent: binding %s to %s: %s\n", from, to, strerror(errno));
}

int umm_enter_layers(struct umm_setup_failure *failure)
{
	unsigned long long count = umm_setup_option("umm.layers");
	if (!count)
		return 0;
	if (count > LAYERS_MAX) {
		errno = E2BIG;
		return umm_setup_fail(failure, "%llu layers, at most %d are possible", count, LAYERS_MAX);
	}
	int err = make_overlay((unsigned)count, failure);
	if (err)
		return err;
	mkdir("/dev/shm", 01777);
	bind_to("/rw/shm", "/dev/shm");
	bind_to("/rw/tmp", "/root/tmp");
	move_to("/dev", "/root/dev");
	move_to("/proc", "/root/proc");
	move_to("/sys", "/root/sys");
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		return umm_setup_fail(failure, "switching to the root file system");
	return 0;
}
