#include "notifier/watched.h"

#include <errno.h>
#include <string.h>

/* The first piece that ends after `address`. */
static uint64_t find(const struct watched *watched, uint64_t address)
{
	uint64_t low = 0, high = watched->n;
	while (low < high) {
		uint64_t middle = (low + high) / 2;
		if (watched->pieces[middle].end <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void insert(struct watched *watched, uint64_t at, struct watched_piece piece)
{
	struct watched_piece *place = watched->pieces + at;
	memmove(place + 1, place, (watched->n - at) * sizeof(*place));
	*place = piece;
	watched->n++;
}

void watched_drop(struct watched *watched, uint64_t at)
{
	struct watched_piece *place = watched->pieces + at;
	watched->n--;
	memmove(place, place + 1, (watched->n - at) * sizeof(*place));
}

/* No piece lies on both sides of `address` any more. */
static void cut(struct watched *watched, uint64_t address)
{
	uint64_t at = find(watched, address);
	if (at == watched->n || watched->pieces[at].start >= address)
		return;
	struct watched_piece tail = watched->pieces[at];
	tail.start = watched->pieces[at].end = address;
	insert(watched, at + 1, tail);
}

/* Puts together again what has become equal, from one piece before the range to one behind it. */
static void join(struct watched *watched, uint64_t start, uint64_t end)
{
	uint64_t at = find(watched, start);
	if (at > 0)
		at--;
	while (at + 1 < watched->n && watched->pieces[at].start < end) {
		struct watched_piece *one = &watched->pieces[at], *two = one + 1;
		if (one->end == two->start && one->count == two->count && one->gone == two->gone) {
			one->end = two->end;
			watched_drop(watched, at + 1);
		} else {
			at++;
		}
	}
}

int watched_add(struct watched *watched, uint64_t start, uint64_t end)
{
	/* two cuts, and a new piece in every gap */
	if (2 * watched->n + 3 > watched->room)
		return -ENOSPC;
	cut(watched, start);
	cut(watched, end);
	uint64_t from = start;
	for (uint64_t at = find(watched, start); from < end; at++) {
		bool last = at == watched->n || watched->pieces[at].start >= end;
		uint64_t next = last ? end : watched->pieces[at].start;
		if (from < next) {
			insert(watched, at, (struct watched_piece){from, next, 1, false});
			from = next;
			continue;
		}
		watched->pieces[at].count++;
		watched->pieces[at].gone = false;
		from = watched->pieces[at].end;
	}
	join(watched, start, end);
	return 0;
}

int watched_remove(struct watched *watched, uint64_t start, uint64_t end)
{
	uint64_t from = start;
	for (uint64_t at = find(watched, start); from < end; at++) {
		if (at == watched->n || watched->pieces[at].start > from || !watched->pieces[at].count)
			return -ENOENT;
		from = watched->pieces[at].end;
	}
	if (watched->n + 2 > watched->room)
		return -ENOSPC;
	cut(watched, start);
	cut(watched, end);
	for (uint64_t at = find(watched, start); at < watched->n && watched->pieces[at].start < end;) {
		struct watched_piece *piece = &watched->pieces[at];
		piece->count--;
		if (!piece->count && piece->gone)
			watched_drop(watched, at);
		else
			at++;
	}
	join(watched, start, end);
	return 0;
}

void watched_gone(struct watched *watched, uint64_t start, uint64_t end)
{
	if (watched->n + 2 <= watched->room) {
		cut(watched, start);
		cut(watched, end);
	}
	for (uint64_t at = find(watched, start); at < watched->n && watched->pieces[at].start < end;) {
		watched->pieces[at].gone = true;
		if (!watched->pieces[at].count)
			watched_drop(watched, at);
		else
			at++;
	}
	join(watched, start, end);
}

bool watched_unwanted(struct watched *watched, uint64_t *at)
{
	while (*at < watched->n && watched->pieces[*at].count)
		++*at;
	return *at < watched->n;
}
