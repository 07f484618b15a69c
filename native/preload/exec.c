/* Programs that replace themselves or end without exit(3): the memory goes, and that is told before.
 *
 * Whether exec will succeed is not known before; so it is told only when there is such a file that may be
 * executed, and a failure after all (ENOEXEC, E2BIG) is told, too: the memory is still there, and can be
 * subscribed to anew. In the child of a vfork nothing is told: its memory is the parent's. */
#include <alloca.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/tell.h"

#define CAUGHT __attribute__((visibility("default")))

extern char **environ;

typedef int execvpe_function(const char *, char *const[], char *const[]);
static execvpe_function *next_execvpe;

__attribute__((constructor)) static void find_next(void)
{
	next_execvpe = (execvpe_function *)dlsym(RTLD_NEXT, "execvpe");
}

static bool can_execute(int folder, const char *path, int flags)
{
	struct stat about;
	return fstatat(folder, path, &about, flags & AT_EMPTY_PATH) == 0 && S_ISREG(about.st_mode) &&
	       (flags & AT_EMPTY_PATH || faccessat(folder, path, X_OK, 0) == 0);
}

static bool can_find(const char *file)
{
	if (strchr(file, '/'))
		return can_execute(AT_FDCWD, file, 0);
	const char *at = getenv("PATH");
	size_t length = strlen(file);
	for (at = at ? at : "/bin:/usr/bin"; length;) {
		char path[PATH_MAX];
		size_t folder = strcspn(at, ":");
		if (folder + 1 + length < sizeof(path)) {
			memcpy(path, at, folder);
			path[folder] = '/';
			memcpy(path + folder + (folder > 0), file, length + 1);
			if (can_execute(AT_FDCWD, path, 0))
				return true;
		}
		if (!at[folder])
			return false;
		at += folder + 1;
	}
	return false;
}

static int failed(bool told)
{
	int error = errno;
	if (told)
		tell_stay(error);
	errno = error;
	return -1;
}

CAUGHT int execve(const char *path, char *const arguments[], char *const environment[])
{
	bool told = can_execute(AT_FDCWD, path, 0) && tell_leave(UMM_REASON_EXEC);
	syscall(SYS_execve, path, arguments, environment);
	return failed(told);
}

CAUGHT int execveat(
        int folder, const char *path, char *const arguments[], char *const environment[], int flags)
{
	bool told = can_execute(folder, path, flags) && tell_leave(UMM_REASON_EXEC);
	syscall(SYS_execveat, folder, path, arguments, environment, flags);
	return failed(told);
}

CAUGHT int fexecve(int fd, char *const arguments[], char *const environment[])
{
	return execveat(fd, "", arguments, environment, AT_EMPTY_PATH);
}

CAUGHT int execvpe(const char *file, char *const arguments[], char *const environment[])
{
	if (!next_execvpe) {
		errno = ENOSYS;
		return -1;
	}
	bool told = can_find(file) && tell_leave(UMM_REASON_EXEC);
	next_execvpe(file, arguments, environment);
	return failed(told);
}

CAUGHT int execv(const char *path, char *const arguments[])
{
	return execve(path, arguments, environ);
}

CAUGHT int execvp(const char *file, char *const arguments[])
{
	return execvpe(file, arguments, environ);
}

/* The arguments from `first` up to a NULL, as an array on the caller's stack. */
#define GATHER(array, list, first)                                                                           \
	do {                                                                                                 \
		va_list count_list;                                                                          \
		size_t count = 1, gathered = 1;                                                              \
		va_copy(count_list, list);                                                                   \
		while (va_arg(count_list, char *))                                                           \
			count++;                                                                             \
		va_end(count_list);                                                                          \
		(array) = alloca((count + 1) * sizeof(*(array)));                                            \
		(array)[0] = (char *)(first);                                                                \
		while (((array)[gathered] = va_arg(list, char *)))                                           \
			gathered++;                                                                          \
	} while (0)

CAUGHT int execl(const char *path, const char *first, ...)
{
	char **arguments;
	va_list list;
	va_start(list, first);
	GATHER(arguments, list, first);
	va_end(list);
	return execve(path, arguments, environ);
}

CAUGHT int execlp(const char *file, const char *first, ...)
{
	char **arguments;
	va_list list;
	va_start(list, first);
	GATHER(arguments, list, first);
	va_end(list);
	return execvpe(file, arguments, environ);
}

CAUGHT int execle(const char *path, const char *first, ...)
{
	char **arguments, **environment;
	va_list list;
	va_start(list, first);
	GATHER(arguments, list, first);
	environment = va_arg(list, char **);
	va_end(list);
	return execve(path, arguments, environment);
}

CAUGHT __attribute__((noreturn)) void _exit(int status)
{
	tell_leave(UMM_REASON_EXIT);
	for (;;)
		syscall(SYS_exit_group, status);
}

CAUGHT __attribute__((noreturn)) void _Exit(int status)
{
	_exit(status);
}
