/* The program that runs commands in a guest: /init of its initramfs.
 *
 * `agent --fd N` talks on an open descriptor instead, sets nothing up and kills only what it started: for
 * tests.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/serve.h"
#include "guest/setup.h"

static const char port_name[] = "uspace_mm.agent";

/* The command may take all memory, all processes and all CPU time: none of it may stop us from saying so. */
static void protect(void)
{
	struct sched_param first = {.sched_priority = 1};

	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, "-1000", 5);
		close(fd);
	}
	mlockall(MCL_CURRENT | MCL_FUTURE);
	sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
}

static void open_console(void)
{
	/* The kernel gave us its console, if the initramfs has the node; otherwise devtmpfs has it now. */
	if (fcntl(STDERR_FILENO, F_GETFD) >= 0)
		return;
	int fd = open("/dev/console", O_RDWR | O_NOCTTY);
	if (fd < 0)
		fd = open("/dev/null", O_RDWR);
	for (int i = fd + 1; fd >= 0 && i <= STDERR_FILENO; i++)
		dup2(fd, i);
}

static int init(void)
{
	struct umm_setup_failure failure = {0}, port_failure = {0};

	umask(022);
	int err = umm_setup_early(&failure);
	open_console();
	reboot(RB_DISABLE_CAD);
	if (!err)
		err = umm_setup_root(&failure);
	if (err)
		umm_say("agent: %s: %s\n", failure.what, strerror(failure.error));
	int port = umm_open_port(port_name, &port_failure);
	if (port < 0) {
		umm_say("agent: %s: %s\n", port_failure.what, strerror(port_failure.error));
	} else {
		protect();
		int result = umm_serve(port, true, err ? failure.what : NULL, failure.error);
		if (result < 0)
			umm_say("agent: the conversation with the host ended: %s\n", strerror(-result));
	}
	/* Whoever reads the console sees why before QEMU ends. */
	sync();
	reboot(RB_POWER_OFF);
	return 1;
}

int main(int argc, char **argv)
{
	if (getpid() == 1)
		return init();
	if (argc != 3 || strcmp(argv[1], "--fd")) {
		fprintf(stderr, "usage: %s --fd N\n", argv[0]);
		return 2;
	}
	int fd = atoi(argv[2]);
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	int result = umm_serve(fd, false, NULL, 0);
	if (result < 0)
		fprintf(stderr, "agent: %s\n", strerror(-result));
	return result < 0;
}
