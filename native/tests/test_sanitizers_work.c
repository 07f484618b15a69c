/* A sanitizer that finds nothing because it cannot work here looks like a pass. So: a child does each
 * wrong thing, and has to be ended for it. */
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void *volatile escaped;

/* Touched by two threads, without a lock. */
static int contended;

#ifdef __SANITIZE_ADDRESS__
__attribute__((noinline)) static void leak(void)
{
	escaped = malloc(4711);
	escaped = NULL;
}

__attribute__((noinline)) static void use_after_free(void)
{
	escaped = malloc(16);
	free(escaped);
	((volatile char *)escaped)[3] = 1;
}

__attribute__((noinline)) static void overflow(void)
{
	volatile int largest = INT_MAX;
	largest = largest + 1;
}
#endif

#ifdef __SANITIZE_THREAD__
static void *contend(void *arg)
{
	for (int i = 0; i < 1000; i++)
		contended++;
	return arg;
}

__attribute__((noinline)) static void race(void)
{
	pthread_t threads[2];
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, contend, NULL);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}
#endif

static int is_found(const char *what, void (*wrong)(void))
{
	fflush(NULL);
	pid_t pid = fork();
	if (pid == 0) {
		int null = open("/dev/null", O_WRONLY);
		dup2(null, STDERR_FILENO);
		wrong();
		exit(0);
	}
	int status = 0;
	waitpid(pid, &status, 0);
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
		return 1;
	fprintf(stderr, "the sanitizer did not see this: %s\n", what);
	return 0;
}

int main(void)
{
	int ok = 1;
#ifdef __SANITIZE_ADDRESS__
	ok &= is_found("use after free", use_after_free);
	ok &= is_found("signed overflow", overflow);
	ok &= is_found("a leak", leak);
#endif
#ifdef __SANITIZE_THREAD__
	ok &= is_found("a data race", race);
#endif
	(void)contended;
	(void)escaped;
	(void)is_found;
	return ok ? 0 : 1;
}
