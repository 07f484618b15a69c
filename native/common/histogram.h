/* A histogram of nanoseconds with a relative error of at most 1/32 (HDR: exponent and 5 bits of mantissa).
 *
 * Fixed size, no allocation. umm_histogram_record may run in several threads at once; a snapshot taken
 * meanwhile is a mix of before and after, never torn within one bucket. */
#ifndef UMM_COMMON_HISTOGRAM_H
#define UMM_COMMON_HISTOGRAM_H

#include <stdint.h>

enum {
	UMM_HISTOGRAM_SUB_BITS = 5,
	/* values below 2^42 ns (73 minutes); larger ones count in the last bucket */
	UMM_HISTOGRAM_BUCKETS = (42 - UMM_HISTOGRAM_SUB_BITS + 1) << UMM_HISTOGRAM_SUB_BITS,
};

struct umm_histogram {
	uint64_t count, sum, min, max; /* min is 0 when count is 0 */
	uint64_t buckets[UMM_HISTOGRAM_BUCKETS];
};

void umm_histogram_record(struct umm_histogram *histogram, uint64_t ns);
/* Adds `from` to `to`; `from` may be recorded into meanwhile. */
void umm_histogram_add(struct umm_histogram *to, const struct umm_histogram *from);
/* The smallest value v such that a fraction q of the records is <= v (upper edge of its bucket, at most max).
 */
uint64_t umm_histogram_quantile(const struct umm_histogram *histogram, double q);
/* Index of a value's bucket, and the bucket's bounds [low, high). */
unsigned umm_histogram_bucket(uint64_t ns);
void umm_histogram_bounds(unsigned bucket, uint64_t *low, uint64_t *high);

#endif
