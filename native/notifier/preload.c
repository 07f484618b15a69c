/* The core's side of the preloaded library. */
#include "notifier/preload.h"

#include <link.h>
#include <stddef.h>

#include "notifier/calls.h"

/* Weak: found when the library is preloaded, as it is in the global scope then; else NULL. */
int umm_preload_attach(const struct umm_preload_hooks *) __attribute__((weak, visibility("default")));

static void start(struct umm_told *told)
{
	umm_told_start(told, UMM_SOURCE_PRELOAD);
}

static void post(uint64_t from, uint64_t end, uint64_t to, int reason)
{
	umm_notify_post(umm_space_self(), from, end, to, UMM_SOURCE_PRELOAD, reason, UMM_PROMISE_AFTER);
}

static void leave(int reason)
{
	umm_space_release(umm_space_self(), UMM_SOURCE_PRELOAD, reason, UMM_PROMISE_ORDERED);
}

static void stay(void)
{
	umm_space_revive(umm_space_self());
}

static struct umm_preload_hooks hooks = {
        .version = UMM_PRELOAD_VERSION,
        .told_size = sizeof(struct umm_told),
        .teller = {.start = start, .end = umm_told_end},
        .post = post,
        .leave = leave,
        .stay = stay,
};
static bool attached;

/* The code of the object that this function is in. */
static int find_own(struct dl_phdr_info *info, size_t size, void *context)
{
	(void)size, (void)context;
	uintptr_t here = (uintptr_t)find_own;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
		uintptr_t from = info->dlpi_addr + segment->p_vaddr;
		if (segment->p_type != PT_LOAD || here < from || here >= from + segment->p_memsz)
			continue;
		hooks.own_start = from;
		hooks.own_end = from + segment->p_memsz;
		return 1;
	}
	return 0;
}

__attribute__((constructor)) static void attach(void)
{
	if (!umm_preload_attach)
		return;
	dl_iterate_phdr(find_own, NULL);
	attached = umm_preload_attach(&hooks) == 0;
}

bool umm_preload_is_there(void)
{
	return attached;
}
