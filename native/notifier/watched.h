/* The ranges of a watch: disjoint pieces in order of address, each with how often it was added. The memory is
 * the caller's, so that nothing is allocated; not locked. */
#ifndef UMM_NOTIFIER_WATCHED_H
#define UMM_NOTIFIER_WATCHED_H

#include <stdbool.h>
#include <stdint.h>

struct watched_piece {
	uint64_t start, end;
	uint32_t count; /* adds without their remove; 0: to be unregistered */
	bool gone;      /* its mapping went after the last add: whatever is there now is not ours */
};

struct watched {
	struct watched_piece *pieces;
	uint64_t n, room;
};

/* -ENOSPC, with nothing changed. */
int watched_add(struct watched *watched, uint64_t start, uint64_t end);
/* -ENOENT: not all of it was added; -ENOSPC; with nothing changed. Pieces that nobody wants any more are
 * dropped if they are gone, and else stay with count 0. */
int watched_remove(struct watched *watched, uint64_t start, uint64_t end);
/* The mappings in the range went. Never fails: without room for a cut, whole pieces count as gone, which
 * leaves them registered longer than they need be. */
void watched_gone(struct watched *watched, uint64_t start, uint64_t end);
/* A piece with count 0, from index *at on; false: none. */
bool watched_unwanted(struct watched *watched, uint64_t *at);
/* The piece of this index was unregistered. */
void watched_drop(struct watched *watched, uint64_t at);

#endif
