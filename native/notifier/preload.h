/* What the preloaded library (native/preload) and the core in a process say to each other.
 *
 * The library is there before the core, and without it in programs that do not know us; so it has one
 * function, to which the core, when it is loaded, hands what shall be called. */
#ifndef UMM_NOTIFIER_PRELOAD_H
#define UMM_NOTIFIER_PRELOAD_H

#include <stdbool.h>
#include <stdint.h>

#include "notifier/perform.h"

enum { UMM_PRELOAD_VERSION = 1 };

struct umm_preload_hooks {
	uint32_t version;   /* UMM_PRELOAD_VERSION */
	uint32_t told_size; /* sizeof(struct umm_told): both were compiled from the same sources */
	/* Text of the core: what it does itself is not told (pagers tell it themselves, fault handlers must
	 * not wait for anybody). */
	uintptr_t own_start, own_end;
	struct umm_teller teller;
	/* A change that was made inside of a hook: by a callback, or a signal handler meanwhile. Told after.
	 */
	void (*post)(uint64_t start, uint64_t end, uint64_t to, int reason);
	/* Before exec or _exit: UMM_REASON_EXEC, UMM_REASON_EXIT. */
	void (*leave)(int reason);
	/* exec failed: the memory is still there. */
	void (*stay)(void);
};

/* 0; -EINVAL: of another version; -EBUSY: another core is there. `hooks` and the code behind it stay for
 * as long as the process. */
int umm_preload_attach(const struct umm_preload_hooks *hooks);

/* In the core: did it find the preloaded library in this process? */
bool umm_preload_is_there(void);

#endif
