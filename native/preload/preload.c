/* The preloaded library: the calls that change memory, of code that does not know us, are told before and
 * after.
 *
 * It stands in front of libc's functions of these names, so it may be called before any constructor has run,
 * by another library's malloc, in signal handlers and in the child of a vfork. It calls the kernel itself and
 * needs nothing of libc's but `syscall` and errno. When nobody listens, a call costs one load more.
 *
 * Not caught: what libc does inside of itself (free() that gives memory back, thread stacks, dlclose), raw
 * system calls, and programs that are linked statically or run with more rights than their caller's (which
 * ld.so preloads nothing into). For those there is the watch (notifier/watch.h). posix_madvise is not in
 * front: in glibc its DONTNEED does nothing. */
/* With it mmap would be another name of mmap64; off_t has 64 bits all the same. */
#undef _FILE_OFFSET_BITS
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/tell.h"

#define CAUGHT __attribute__((visibility("default")))
#define CALLER __builtin_return_address(0)

static int said(int error, int saved)
{
	errno = error ? -error : saved;
	return error ? -1 : 0;
}

static void *map(
        const void *caller, void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	const struct umm_teller *teller = teller_for(caller);
	if (!teller)
		return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
	uint64_t ret;
	int saved = errno;
	int error = umm_perform_mmap(
	        teller, (uintptr_t)address, length, protection, (unsigned)flags, fd, (uint64_t)offset, &ret);
	return said(error, saved) ? MAP_FAILED : (void *)(uintptr_t)ret;
}

CAUGHT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	return map(CALLER, address, length, protection, flags, fd, offset);
}

CAUGHT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	return map(CALLER, address, length, protection, flags, fd, offset);
}

CAUGHT int munmap(void *address, size_t length)
{
	const struct umm_teller *teller = teller_for(CALLER);
	if (!teller)
		return (int)syscall(SYS_munmap, address, length);
	int saved = errno;
	return said(umm_perform_munmap(teller, (uintptr_t)address, length), saved);
}

CAUGHT void *mremap(void *address, size_t old_length, size_t new_length, int flags, ...)
{
	void *new_address = NULL;
	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_list list;
		va_start(list, flags);
		new_address = va_arg(list, void *);
		va_end(list);
	}
	const struct umm_teller *teller = teller_for(CALLER);
	if (!teller)
		return (void *)syscall(SYS_mremap, address, old_length, new_length, flags, new_address);
	uint64_t ret;
	int saved = errno;
	int error = umm_perform_mremap(teller, (uintptr_t)address, old_length, new_length, (unsigned)flags,
	        (uintptr_t)new_address, &ret);
	return said(error, saved) ? MAP_FAILED : (void *)(uintptr_t)ret;
}

CAUGHT int madvise(void *address, size_t length, int advice)
{
	const struct umm_teller *teller = teller_for(CALLER);
	if (!teller)
		return (int)syscall(SYS_madvise, address, length, advice);
	int saved = errno;
	return said(umm_perform_madvise(teller, (uintptr_t)address, length, advice), saved);
}

CAUGHT int mprotect(void *address, size_t length, int protection)
{
	const struct umm_teller *teller = teller_for(CALLER);
	if (!teller)
		return (int)syscall(SYS_mprotect, address, length, protection);
	int saved = errno;
	return said(umm_perform_mprotect(teller, (uintptr_t)address, length, protection), saved);
}
