#include "guest/spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest/command.h"

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/* execvp(3) would hand a file that is no program to a shell: a binary of another architecture has to fail. */
static int execute(const char *name, char *const *argv, char *const *env)
{
	char path[PATH_MAX];
	int error = ENOENT;

	if (strchr(name, '/')) {
		execve(name, argv, env);
		return errno;
	}
	const char *dirs = default_path;
	for (char *const *entry = env; *entry; entry++) {
		if (!strncmp(*entry, "PATH=", 5))
			dirs = *entry + 5;
	}
	while (*name && *dirs) {
		size_t length = strcspn(dirs, ":");
		int written =
		        snprintf(path, sizeof path, "%.*s%s%s", (int)length, dirs, length ? "/" : "", name);
		if (written < (int)sizeof path) {
			execve(path, argv, env);
			if (errno != ENOENT && errno != ENOTDIR)
				error = errno;
			/* Another folder may hold one that may be executed. */
			if (error != ENOENT && error != EACCES)
				return error;
		}
		dirs += length + (dirs[length] == ':');
	}
	return error;
}

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, text, strlen(text));
		close(fd);
	}
}

static void default_signals(void)
{
	struct sigaction action = {.sa_handler = SIG_DFL};
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &action, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* The ends may lie on the numbers that they go to: all are moved above them first. */
static bool place_descriptors(const struct umm_spawn *spawn, int *errors)
{
	const int from[] = {spawn->in, spawn->out, spawn->err, spawn->report};
	const int to[] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO, UMM_REPORT_DESCRIPTOR};
	int moved[4];

	*errors = fcntl(*errors, F_DUPFD_CLOEXEC, UMM_REPORT_DESCRIPTOR + 1);
	for (int i = 0; i < 4; i++) {
		moved[i] = fcntl(from[i], F_DUPFD_CLOEXEC, UMM_REPORT_DESCRIPTOR + 1);
		if (moved[i] < 0)
			return false;
	}
	for (int i = 0; i < 4; i++) {
		if (dup2(moved[i], to[i]) < 0)
			return false;
	}
	return *errors >= 0;
}

static void child(const struct umm_spawn *spawn, int errors) __attribute__((noreturn));
static void child(const struct umm_spawn *spawn, int errors)
{
	struct umm_spawn_failure failure = {.what = "set up"};

	if (spawn->cgroup >= 0 && write(spawn->cgroup, "0", 1) != 1) {
		snprintf(failure.what, sizeof failure.what, "join the control group");
		goto fail;
	}
	write_text("/proc/self/oom_score_adj", "0");
	default_signals();
	setsid();
	if (spawn->terminal >= 0 && ioctl(spawn->terminal, TIOCSCTTY, 0) < 0)
		goto fail;
	if (!place_descriptors(spawn, &errors))
		goto fail;
	if (chdir(spawn->cwd)) {
		snprintf(failure.what, sizeof failure.what, "chdir");
		goto fail;
	}
	failure.what[0] = '\0';
	errno = execute(spawn->argv[0], spawn->argv, spawn->env);
fail:
	failure.error = errno;
	(void)!write(errors, &failure, sizeof failure);
	_exit(127);
}

int umm_spawn(const struct umm_spawn *spawn, pid_t *pid, struct umm_spawn_failure *failure)
{
	int errors[2];

	*failure = (struct umm_spawn_failure){.what = "fork"};
	if (pipe2(errors, O_CLOEXEC))
		return -(failure->error = errno);
	*pid = fork();
	if (!*pid)
		child(spawn, errors[1]);
	failure->error = errno;
	close(errors[1]);
	if (*pid < 0) {
		close(errors[0]);
		return -failure->error;
	}
	/* The end of file comes with the exec, which closes the child's end. */
	ssize_t got;
	do {
		got = read(errors[0], failure, sizeof *failure);
	} while (got < 0 && errno == EINTR);
	close(errors[0]);
	if (got != (ssize_t)sizeof *failure)
		return 0;
	waitpid(*pid, NULL, 0);
	return -failure->error;
}
