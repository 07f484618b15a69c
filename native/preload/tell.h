/* Who listens in this process, and telling them. Shared by the files of the preloaded library.
 *
 * Listeners: the core, when a program has it (umm_preload_attach), and a ring that another process reads
 * (UMM_NOTIFY_SHM in the environment). */
#ifndef UMM_PRELOAD_TELL_H
#define UMM_PRELOAD_TELL_H

#include <stdbool.h>

#include "notifier/perform.h"

/* NULL: nobody listens, or the call is the core's own. Safe at any time, also before any constructor. */
const struct umm_teller *teller_for(const void *caller);
/* This process is about to be replaced or to end; not in a child of vfork, which has the memory of
 * another. Returns whether anybody was told. */
bool tell_leave(int reason);
/* exec failed, with errno `error`. */
void tell_stay(int error);

#endif
