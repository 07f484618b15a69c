/*
 * Loads ELF files and says what happened, for the page-size audit: runs in a guest.
 *
 *   probe JOBS
 *
 * A line of JOBS is one job, its fields separated by tabs: ID KIND TIMEOUT_MS FILE [NAME=VALUE...] ARGV...
 * KIND `library`: ARGV is the opener and the library; FILE is compared with memory when the opener stops
 * itself. KIND `executable`: ARGV[0] is FILE; compared at its entry point, when its loader is done, then it
 * runs on. KIND `command`: nothing is compared (an import).
 *
 * Prints per job: `job ID`, `page SIZE`, the lines of compare.h, `compared ERRNO` (0: done; absent: it never
 * got there), `output TEXT` (the last line it wrote), and at last `exited STATUS`, `killed SIGNAL`,
 * `timeout`, or `unstarted ERRNO`.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "compare.h"

enum { LOAD_ADDRESS_FD = 3, MAX_FIELDS = 64, OUTPUT_LIMIT = 1 << 20, OUTPUT_SHOWN = 400 };

struct job {
	char *id, *kind, *file, **argv;
	long timeout_ms;
};

struct run {
	const struct job *job;
	pid_t pid;
	int output;       /* a memfd that takes stdout and stderr */
	int load_address; /* reading end of the opener's descriptor */
	int started;      /* the exec was seen */
	int compared;
	uint64_t entry;
	long original; /* the word at the entry that the breakpoint replaced */
};

static long now_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static _Noreturn void child(const struct job *job, int output, int report, int failed)
{
	struct rlimit files = {OUTPUT_LIMIT, OUTPUT_LIMIT}, core = {0, 0};
	setpgid(0, 0);
	int null = open("/dev/null", O_RDONLY);
	dup2(null, 0);
	dup2(output, 1);
	dup2(output, 2);
	dup2(report, LOAD_ADDRESS_FD);
	setrlimit(RLIMIT_FSIZE, &files);
	setrlimit(RLIMIT_CORE, &core);
	ptrace(PTRACE_TRACEME, 0, NULL, NULL);
	char **argv = job->argv;
	while (argv[0] && argv[0][0] != '/' && strchr(argv[0], '='))
		putenv(*argv++);
	execv(argv[0] ? argv[0] : "", argv);
	int err = errno;
	if (write(failed, &err, sizeof(err)) < 0)
		_exit(126);
	_exit(127);
}

static int auxv_of(pid_t pid, unsigned long type, uint64_t *ret)
{
	char name[64];
	unsigned long entry[2];
	snprintf(name, sizeof(name), "/proc/%d/auxv", pid);
	int fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	int err = -ENOENT;
	while (read(fd, entry, sizeof(entry)) == sizeof(entry) && entry[0])
		if (entry[0] == type) {
			*ret = entry[1];
			err = 0;
		}
	close(fd);
	return err;
}

static void compare(struct run *run, uint64_t bias)
{
	char path[PATH_MAX];
	int err = realpath(run->job->file, path) ? umm_elf_compare(run->pid, path, bias, stdout) : -errno;
	printf("compared %d\n", -err);
	run->compared = 1;
}

/* The program was replaced by exec, nothing of the new one has run. */
static void at_exec(struct run *run)
{
	run->started = 1;
	if (strcmp(run->job->kind, "executable") || auxv_of(run->pid, AT_ENTRY, &run->entry))
		return;
	errno = 0;
	run->original = ptrace(PTRACE_PEEKTEXT, run->pid, run->entry, NULL);
	if (errno) {
		printf("unmapped entry\n");
		run->entry = 0;
		return;
	}
	/* brk #0; the upper half of the word is the next instruction. */
	long word = (long)(((unsigned long)run->original & 0xffffffff00000000ul) | 0xd4200000ul);
	if (ptrace(PTRACE_POKETEXT, run->pid, run->entry, word))
		run->entry = 0;
}

static int at_entry(struct run *run)
{
	struct user_regs_struct regs;
	struct iovec iov = {&regs, sizeof(regs)};
	if (!run->entry || ptrace(PTRACE_GETREGSET, run->pid, NT_PRSTATUS, &iov) || regs.pc != run->entry)
		return 0;
	Elf64_Ehdr header = {0};
	int fd = open(run->job->file, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, &header, sizeof(header));
	if (fd >= 0)
		close(fd);
	ptrace(PTRACE_POKETEXT, run->pid, run->entry, run->original);
	if (got == sizeof(header))
		compare(run, run->entry - header.e_entry);
	run->entry = 0;
	return 1;
}

/* Returns the signal to deliver. */
static int at_stop(struct run *run, int signal)
{
	if (signal == SIGTRAP && !run->started) {
		at_exec(run);
		return 0;
	}
	if (signal == SIGTRAP && at_entry(run))
		return 0;
	uint64_t bias;
	if (signal == SIGSTOP && !strcmp(run->job->kind, "library") && !run->compared &&
	        read(run->load_address, &bias, sizeof(bias)) == sizeof(bias)) {
		compare(run, bias);
		return 0;
	}
	return signal;
}

static void follow(struct run *run)
{
	long deadline = now_ms() + run->job->timeout_ms;
	for (;;) {
		int status;
		pid_t got = waitpid(run->pid, &status, __WALL | WNOHANG);
		if (got == 0) {
			if (now_ms() < deadline) {
				usleep(500);
				continue;
			}
			kill(-run->pid, SIGKILL);
			kill(run->pid, SIGKILL);
			waitpid(run->pid, &status, __WALL);
			printf("timeout\n");
			return;
		}
		if (got < 0) {
			printf("unstarted %d\n", errno);
			return;
		}
		if (WIFEXITED(status)) {
			printf("exited %d\n", WEXITSTATUS(status));
			return;
		}
		if (WIFSIGNALED(status)) {
			printf("killed %d\n", WTERMSIG(status));
			return;
		}
		ptrace(PTRACE_CONT, run->pid, NULL, (long)at_stop(run, WSTOPSIG(status)));
	}
}

static void print_output(int output)
{
	static char text[OUTPUT_LIMIT + 1];
	ssize_t length = pread(output, text, OUTPUT_LIMIT, 0);
	if (length <= 0)
		return;
	while (length > 0 && (text[length - 1] == '\n' || text[length - 1] == ' '))
		length--;
	text[length] = '\0';
	char *last = memrchr(text, '\n', (size_t)length);
	last = last ? last + 1 : text;
	for (char *c = last; *c; c++)
		if ((unsigned char)*c < ' ')
			*c = ' ';
	if (*last)
		printf("output %.*s\n", OUTPUT_SHOWN, last);
}

static int run_job(const struct job *job)
{
	int failed[2], report[2], err = 0;
	struct run run = {.job = job, .output = memfd_create("output", MFD_CLOEXEC)};
	if (run.output < 0 || pipe2(failed, O_CLOEXEC))
		return -errno;
	if (pipe2(report, O_CLOEXEC | O_NONBLOCK))
		return -errno;
	run.load_address = report[0];
	printf("job %s\npage %ld\n", job->id, sysconf(_SC_PAGESIZE));
	fflush(stdout);
	run.pid = fork();
	if (run.pid == 0)
		child(job, run.output, report[1], failed[1]);
	close(failed[1]);
	if (run.pid > 0)
		follow(&run);
	if (run.pid > 0)
		kill(-run.pid, SIGKILL); /* what it left running */
	if (run.pid > 0 && !run.started && read(failed[0], &err, sizeof(err)) == sizeof(err))
		printf("unstarted %d\n", err);
	print_output(run.output);
	printf("end\n");
	fflush(stdout);
	close(failed[0]);
	close(report[0]);
	close(report[1]);
	close(run.output);
	return 0;
}

int main(int argc, char **argv)
{
	char *line = NULL;
	size_t capacity = 0;
	FILE *jobs = argc == 2 ? fopen(argv[1], "re") : NULL;
	if (!jobs) {
		fprintf(stderr, "usage: probe JOBS\n");
		return 2;
	}
	while (getline(&line, &capacity, jobs) > 0) {
		char *fields[MAX_FIELDS + 1] = {0}, *rest = line;
		int count = 0;
		line[strcspn(line, "\n")] = '\0';
		while (count < MAX_FIELDS && (fields[count] = strsep(&rest, "\t")))
			count++;
		if (count < 5)
			continue;
		fields[count < MAX_FIELDS ? count : MAX_FIELDS] = NULL;
		struct job job = {fields[0], fields[1], fields[3], fields + 4, atol(fields[2])};
		run_job(&job);
	}
	free(line);
	fclose(jobs);
	return 0;
}
