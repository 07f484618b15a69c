/* Bitmaps over pages: bit p & 7 of byte p >> 3, as the pager and the wire have them. */
#ifndef UMM_POSTCOPY_BITMAP_H
#define UMM_POSTCOPY_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t umm_bitmap_bytes(uint64_t pages)
{
	return (pages + 7) / 8;
}

static inline bool umm_bitmap_test(const uint8_t *bitmap, uint64_t page)
{
	return __atomic_load_n(&bitmap[page >> 3], __ATOMIC_ACQUIRE) >> (page & 7) & 1;
}

/* Whether it was set already. */
static inline bool umm_bitmap_test_and_set(uint8_t *bitmap, uint64_t page)
{
	uint8_t bit = (uint8_t)(1u << (page & 7));
	return __atomic_fetch_or(&bitmap[page >> 3], bit, __ATOMIC_ACQ_REL) & bit;
}

static inline void umm_bitmap_clear(uint8_t *bitmap, uint64_t page)
{
	__atomic_fetch_and(&bitmap[page >> 3], (uint8_t)~(1u << (page & 7)), __ATOMIC_ACQ_REL);
}

/* The first page from `from` whose bit is `value`; `pages` when there is none. */
static inline uint64_t umm_bitmap_next(const uint8_t *bitmap, uint64_t pages, uint64_t from, bool value)
{
	const uint8_t skip = value ? 0 : 0xff;
	while (from < pages) {
		if ((from & 7) == 0 && __atomic_load_n(&bitmap[from >> 3], __ATOMIC_ACQUIRE) == skip) {
			from += 8;
			continue;
		}
		if (umm_bitmap_test(bitmap, from) == value)
			return from;
		from++;
	}
	return pages;
}

#endif
