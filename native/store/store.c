/* What all stores share: their reference count. */
#include "store/store.h"

void umm_store_init(struct umm_store *store, const struct umm_store_ops *ops, int kind, uint64_t size)
{
	store->ops = ops;
	store->kind = kind;
	store->size = size;
	store->retries = 0;
	store->timeout_ms = 0;
	atomic_init(&store->refs, 1);
}

void umm_store_get(struct umm_store *store)
{
	atomic_fetch_add_explicit(&store->refs, 1, memory_order_relaxed);
}

void umm_store_put(struct umm_store *store)
{
	if (atomic_fetch_sub_explicit(&store->refs, 1, memory_order_acq_rel) == 1)
		store->ops->destroy(store);
}

void umm_store_set_policy(struct umm_store *store, unsigned retries, unsigned timeout_ms)
{
	store->retries = retries;
	store->timeout_ms = timeout_ms;
}
