/*
 * Opens one library, stops itself so that its memory can be compared, and ends as programs do.
 *
 * It is linked without a libc, so that one source serves glibc and musl: it needs few functions, and its
 * entry calls
 * __libc_start_main, which both have. Exit status: 0 done, 3 dlopen refused (the reason is on stderr).
 */
#include <stddef.h>

enum { NOW = 2, GLOBAL_LINK_MAP = 2, LOAD_ADDRESS_FD = 3, STOP = 19 };

void *dlopen(const char *name, int flags);
char *dlerror(void);
int dlinfo(void *handle, int request, void *ret);
long write(int fd, const void *data, size_t length);
int getpid(void);
int kill(int pid, int signal);
int __libc_start_main(int (*main)(int, char **, char **), int argc, char **argv, void (*init)(void),
        void (*fini)(void), void (*rtld_fini)(void), void *stack_end);

static size_t length_of(const char *text)
{
	size_t length = 0;
	while (text[length])
		length++;
	return length;
}

static int umm_open(int argc, char **argv, char **environment)
{
	unsigned long *link_map = NULL;
	(void)environment;
	if (argc < 2)
		return 2;
	void *library = dlopen(argv[1], NOW);
	if (!library) {
		const char *reason = dlerror();
		write(2, reason, length_of(reason));
		return 3;
	}
	/* Its first field is the load address, in both. */
	if (dlinfo(library, GLOBAL_LINK_MAP, &link_map))
		return 4;
	write(LOAD_ADDRESS_FD, link_map, sizeof(*link_map));
	kill(getpid(), STOP);
	return 0;
}

__attribute__((used, noreturn)) static void umm_start(unsigned long *stack)
{
	__libc_start_main(umm_open, (int)stack[0], (char **)(stack + 1), NULL, NULL, NULL, stack);
	__builtin_trap();
}

__asm__(".globl _start\n"
        "_start:\n"
        "\tmov x29, #0\n"
        "\tmov x30, #0\n"
        "\tmov x0, sp\n"
        "\tb umm_start\n");
