/* Where the bytes of a unit come from, and where modified ones go. The pager knows stores by this
 * interface only.
 *
 * Every operation that the fault path calls (peek, fetch, request) runs in a handler thread with all
 * signals blocked: no malloc, no stdio, no lock that is held across fork(), no access to memory of a
 * region. */
#ifndef UMM_STORE_STORE_H
#define UMM_STORE_STORE_H

#include <stdatomic.h>
#include <stdint.h>

struct umm_region;
struct umm_store;

enum umm_store_kind {
	/* Modified units are kept by the pager (its spill) and never reach the store. */
	UMM_STORE_PRIVATE,
	/* The arrays of the region are read-only. Its memory can still be written by who insists; such
	 * units are then kept as those of PRIVATE are. (Not mapped PROT_READ: UFFDIO_MOVE refuses that.) */
	UMM_STORE_READONLY,
	/* Modified units are written to the store: on eviction, on flush and on close. */
	UMM_STORE_WRITEBACK,
};

struct umm_store_ops {
	const char *name;
	/* The bytes in place, when they are in memory that is always present and that nobody but this
	 * store's write() changes; NULL otherwise. Optional. */
	const void *(*peek)(struct umm_store *store, uint64_t offset, uint64_t len);
	/* Fill buf. May block, but ends: 0, or -errno. Not called for stores that have `request`. */
	int (*fetch)(struct umm_store *store, uint64_t offset, uint64_t len, void *buf);
	/* Ask for bytes without waiting for them: the answer is umm_region_deliver() or
	 * umm_region_fail() from another thread, and may come before this returns. */
	int (*request)(struct umm_store *store, struct umm_region *region, uint64_t offset, uint64_t len);
	/* The region goes away: no answer may come for it once this has returned. */
	void (*forget)(struct umm_store *store, struct umm_region *region);
	/* WRITEBACK stores: called by the evictor or by flush, never by a fault handler. */
	int (*write)(struct umm_store *store, uint64_t offset, uint64_t len, const void *buf);
	int (*flush)(struct umm_store *store);
	/* The store may be asked again in a forked child, whose memory is a copy: 0 or -errno. Optional. */
	int (*after_fork)(struct umm_store *store);
	void (*destroy)(struct umm_store *store);
};

/* Embedded as the first member by each kind of store. */
struct umm_store {
	const struct umm_store_ops *ops;
	int kind;            /* enum umm_store_kind */
	uint64_t size;       /* bytes; a region may be larger by less than a unit: the rest reads as zero */
	unsigned retries;    /* times that a failed fetch is tried again before the unit is poisoned */
	unsigned timeout_ms; /* `request` only: an answer later than this is a failed try; 0: no limit */
	_Atomic unsigned refs;
};

void umm_store_init(struct umm_store *store, const struct umm_store_ops *ops, int kind, uint64_t size);
void umm_store_get(struct umm_store *store);
/* Drops a reference; the last one destroys the store. */
void umm_store_put(struct umm_store *store);

/* Before the store is given to a region: failed fetches are tried again `retries` times; an answer of an
 * asynchronous store that takes longer than `timeout_ms` is a failed try. */
void umm_store_set_policy(struct umm_store *store, unsigned retries, unsigned timeout_ms);

/* All zeros. PRIVATE. */
extern const struct umm_store_ops *const umm_store_zero_ops;
int umm_store_zero_create(uint64_t size, struct umm_store **ret);
/* A copy of memory that the caller keeps alive and does not change (`owned` 0), or memory of the
 * store's own, zero at first (`bytes` NULL). PRIVATE, READONLY or WRITEBACK (then it changes `bytes`). */
int umm_store_memory_create(void *bytes, uint64_t size, int kind, struct umm_store **ret);
/* `size` bytes at `offset` of the open file `fd` (duplicated). direct: O_DIRECT was set on it. */
int umm_store_file_create(
        int fd, uint64_t offset, uint64_t size, int kind, int direct, struct umm_store **ret);
extern const struct umm_store_ops *const umm_store_region_ops;
/* The content that `region` has at the moment of each fetch. PRIVATE or READONLY. -EOPNOTSUPP
 * for a region of a pager in in-thread mode. */
int umm_store_region_create(
        struct umm_region *region, uint64_t offset, uint64_t size, int kind, struct umm_store **ret);

/* Answers of asynchronous stores, and data that comes unasked (postcopy's background stream).
 * offset and len in units. data NULL: zeros. *installed: units that were new; others were there
 * already and are left as they are. */
int umm_region_deliver(
        struct umm_region *region, uint64_t offset, uint64_t len, const void *data, uint64_t *installed);
/* The bytes cannot be had: each missing unit of the range is poisoned, its readers get SIGBUS. */
int umm_region_fail(struct umm_region *region, uint64_t offset, uint64_t len, int error);

/* One try of an asynchronous store failed: asked again as its policy says, then the same. */
int umm_region_refuse(struct umm_region *region, uint64_t offset, uint64_t len, int error);

#endif
