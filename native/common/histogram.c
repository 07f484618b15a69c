#include "common/histogram.h"

unsigned umm_histogram_bucket(uint64_t ns)
{
	const unsigned sub = 1u << UMM_HISTOGRAM_SUB_BITS;
	if (ns < sub)
		return (unsigned)ns;
	unsigned exponent = 63u - (unsigned)__builtin_clzll(ns) - UMM_HISTOGRAM_SUB_BITS;
	unsigned bucket = ((exponent + 1) << UMM_HISTOGRAM_SUB_BITS) + (unsigned)(ns >> exponent) - sub;
	return bucket < UMM_HISTOGRAM_BUCKETS ? bucket : UMM_HISTOGRAM_BUCKETS - 1;
}

void umm_histogram_bounds(unsigned bucket, uint64_t *low, uint64_t *high)
{
	const unsigned sub = 1u << UMM_HISTOGRAM_SUB_BITS;
	if (bucket < sub) {
		*low = bucket;
		*high = bucket + 1;
		return;
	}
	unsigned exponent = (bucket >> UMM_HISTOGRAM_SUB_BITS) - 1;
	uint64_t mantissa = sub + (bucket & (sub - 1));
	*low = mantissa << exponent;
	*high = (mantissa + 1) << exponent;
}

static void lower(uint64_t *cell, uint64_t value, uint64_t empty)
{
	uint64_t seen = __atomic_load_n(cell, __ATOMIC_RELAXED);
	while ((seen == empty || value < seen) &&
	        !__atomic_compare_exchange_n(cell, &seen, value, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void raise_to(uint64_t *cell, uint64_t value)
{
	uint64_t seen = __atomic_load_n(cell, __ATOMIC_RELAXED);
	while (value > seen &&
	        !__atomic_compare_exchange_n(cell, &seen, value, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

void umm_histogram_record(struct umm_histogram *histogram, uint64_t ns)
{
	/* 0 stands for "no minimum yet": a record of 0 ns counts as 1. */
	lower(&histogram->min, ns ? ns : 1, 0);
	raise_to(&histogram->max, ns);
	__atomic_fetch_add(&histogram->sum, ns, __ATOMIC_RELAXED);
	__atomic_fetch_add(&histogram->buckets[umm_histogram_bucket(ns)], 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&histogram->count, 1, __ATOMIC_RELAXED);
}

void umm_histogram_add(struct umm_histogram *to, const struct umm_histogram *from)
{
	uint64_t minimum = __atomic_load_n(&from->min, __ATOMIC_RELAXED);
	if (minimum)
		lower(&to->min, minimum, 0);
	raise_to(&to->max, __atomic_load_n(&from->max, __ATOMIC_RELAXED));
	to->sum += __atomic_load_n(&from->sum, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++) {
		uint64_t n = __atomic_load_n(&from->buckets[i], __ATOMIC_RELAXED);
		to->buckets[i] += n;
		to->count += n; /* the sum of the buckets, so that quantiles of a snapshot add up */
	}
}

uint64_t umm_histogram_quantile(const struct umm_histogram *histogram, double q)
{
	if (histogram->count == 0)
		return 0;
	uint64_t rank = (uint64_t)(q * (double)histogram->count);
	if ((double)rank < q * (double)histogram->count)
		rank++;
	if (rank == 0)
		rank = 1;
	uint64_t seen = 0;
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++) {
		seen += histogram->buckets[i];
		if (seen >= rank) {
			uint64_t low, high;
			umm_histogram_bounds(i, &low, &high);
			return high - 1 < histogram->max ? high - 1 : histogram->max;
		}
	}
	return histogram->max;
}
