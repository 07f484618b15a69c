/* The conversation with the host, from HELLO to its end. */
#ifndef UMM_GUEST_SERVE_H
#define UMM_GUEST_SERVE_H

#include <stdbool.h>

/* Talk on `fd` until the host hangs up (0), asks to power off (1), or negative errno. `is_init`: this is PID
 * 1 of a guest of its own. `failure` is NULL, or why the guest could not be set up: it is told instead of
 * HELLO. */
int umm_serve(int fd, bool is_init, const char *failure, int error);

#endif
