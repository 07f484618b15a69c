/* The ring between a store whose bytes a function in another process computes, and that process.
 *
 * Shared memory: a header, slots, and room for one unit per slot. A slot goes FREE -> ASKED (the pager)
 * -> TAKEN (the worker) -> ANSWERED (the worker) -> FREE (the pager's lane thread). Nothing in it is
 * trusted by the pager but the bytes themselves: which region a slot belongs to is kept on its side. */
#ifndef UMM_STORE_FUNCTION_H
#define UMM_STORE_FUNCTION_H

#include <stdint.h>

#include "store/store.h"

enum { UMM_FUNCTION_SLOTS = 64 };

/* The pager's side. `unit`: the largest unit that will be asked for. *ring_fd: a memfd for the worker, owned
 * by the store. */
int umm_store_function_create(uint64_t size, uint64_t unit, int kind, int *ring_fd, struct umm_store **ret);
/* Requests are answered from now on; `pidfd` (duplicated) tells when the worker is dead. */
int umm_store_function_start(struct umm_store *store, int pidfd);

/* The worker's side. */
struct umm_ring;
int umm_ring_attach(int fd, struct umm_ring **ret);
void umm_ring_detach(struct umm_ring *ring);
/* The next request: its slot number, -ETIMEDOUT after timeout_ms without one, -ECANCELED when the store was
 * closed. */
int umm_ring_take(struct umm_ring *ring, int timeout_ms, uint64_t *offset, uint64_t *len);
/* Answer it: `len` bytes, or an error (positive errno) and no bytes. A length other than the one asked for
 * becomes ENODATA. */
int umm_ring_answer(struct umm_ring *ring, int slot, const void *data, uint64_t len, int error);

#endif
