/* The layout that both sides of a function store's ring share. */
#ifndef UMM_STORE_RING_H
#define UMM_STORE_RING_H

#include <stdatomic.h>
#include <stdint.h>

#include "store/function.h"

enum { SLOT_FREE, SLOT_ASKED, SLOT_TAKEN, SLOT_ANSWERED };

struct ring_slot {
	_Atomic uint32_t state;
	int32_t error;
	uint64_t offset, len;
};

struct ring_shared {
	uint32_t magic, version;
	uint64_t unit, bytes, data_offset;
	_Atomic uint32_t asked;    /* futex: counts requests */
	_Atomic uint32_t answered; /* futex: counts answers */
	_Atomic uint32_t closed;
	struct ring_slot slots[UMM_FUNCTION_SLOTS];
};

static const uint32_t ring_magic = 0x756d6d72, ring_version = 1;

/* Waits while *word is `seen`; at most timeout_ms. */
void ring_wait(_Atomic uint32_t *word, uint32_t seen, int timeout_ms);
void ring_wake(_Atomic uint32_t *word);

#endif
