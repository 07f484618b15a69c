/* The init of a guest that only says what it finds: loads /modules in the order of their names, prints
 * AT_PAGESZ, the file systems, and which of its arguments (paths) exist; then powers off. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void load_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, NULL, alphasort);

	for (int i = 0; i < count; i++) {
		char path[512];
		int fd;

		if (names[i]->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/modules/%s", names[i]->d_name);
		fd = open(path, O_RDONLY);
		if (syscall(SYS_finit_module, fd, "", 0))
			printf("FAILED %s %m\n", names[i]->d_name);
		close(fd);
	}
}

static void mount_at(const char *type, const char *path)
{
	mkdir(path, 0755);
	if (mount(type, path, type, 0, NULL))
		printf("FAILED mount %s %m\n", type);
}

static void print_lines(const char *prefix, const char *path)
{
	char line[256];
	FILE *file = fopen(path, "r");

	while (file && fgets(line, sizeof(line), file))
		printf("%s %s", prefix, line);
	if (file)
		fclose(file);
}

int main(int argc, char **argv)
{
	mount_at("proc", "/proc");
	mount_at("sysfs", "/sys");
	mount_at("devtmpfs", "/dev");
	load_modules();
	mount_at("cgroup2", "/sys/fs/cgroup");
	if (!access("/sys/kernel/tracing", F_OK))
		mount_at("tracefs", "/sys/kernel/tracing");
	printf("\nPAGESZ %lu\n", getauxval(AT_PAGESZ));
	print_lines("FILESYSTEM", "/proc/filesystems");
	print_lines("CONTROLLERS", "/sys/fs/cgroup/cgroup.controllers");
	for (int i = 1; i < argc; i++)
		printf("%s %s\n", access(argv[i], F_OK) ? "ABSENT" : "PRESENT", argv[i]);
	printf("END\n");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	return 1;
}
