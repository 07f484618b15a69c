/* Stores in memory: nothing but zeros, and an array of bytes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "store/store.h"

static void destroy_plain(struct umm_store *store)
{
	free(store);
}

static int zero_fetch(struct umm_store *store, uint64_t offset, uint64_t len, void *buf)
{
	(void)store;
	(void)offset;
	memset(buf, 0, len);
	return 0;
}

static const struct umm_store_ops zero_ops = {.name = "zero", .fetch = zero_fetch, .destroy = destroy_plain};
const struct umm_store_ops *const umm_store_zero_ops = &zero_ops;

int umm_store_zero_create(uint64_t size, struct umm_store **ret)
{
	struct umm_store *store = calloc(1, sizeof(*store));
	if (!store)
		return -ENOMEM;
	umm_store_init(store, &zero_ops, UMM_STORE_PRIVATE, size);
	*ret = store;
	return 0;
}

struct memory_store {
	struct umm_store base;
	uint8_t *bytes;
	int owned;
};

static const void *memory_peek(struct umm_store *store, uint64_t offset, uint64_t len)
{
	(void)len;
	return ((struct memory_store *)store)->bytes + offset;
}

static int memory_fetch(struct umm_store *store, uint64_t offset, uint64_t len, void *buf)
{
	memcpy(buf, ((struct memory_store *)store)->bytes + offset, len);
	return 0;
}

static int memory_write(struct umm_store *store, uint64_t offset, uint64_t len, const void *buf)
{
	memcpy(((struct memory_store *)store)->bytes + offset, buf, len);
	return 0;
}

static int memory_flush(struct umm_store *store)
{
	(void)store;
	return 0;
}

static void memory_destroy(struct umm_store *store)
{
	struct memory_store *memory = (struct memory_store *)store;
	if (memory->owned)
		munmap(memory->bytes, store->size);
	free(memory);
}

static const struct umm_store_ops memory_ops = {
        .name = "memory",
        .peek = memory_peek,
        .fetch = memory_fetch,
        .write = memory_write,
        .flush = memory_flush,
        .destroy = memory_destroy,
};

int umm_store_memory_create(void *bytes, uint64_t size, int kind, struct umm_store **ret)
{
	if (!size || kind < UMM_STORE_PRIVATE || kind > UMM_STORE_WRITEBACK)
		return -EINVAL;
	struct memory_store *memory = calloc(1, sizeof(*memory));
	if (!memory)
		return -ENOMEM;
	umm_store_init(&memory->base, &memory_ops, kind, size);
	memory->bytes = bytes;
	if (!bytes) {
		memory->owned = 1;
		memory->bytes = mmap(NULL, size, PROT_READ | PROT_WRITE,
		        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (memory->bytes == MAP_FAILED) {
			free(memory);
			return -ENOMEM;
		}
	}
	*ret = &memory->base;
	return 0;
}
