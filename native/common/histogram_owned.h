/* Recording into a histogram that one thread at a time writes, under a lock of its owner: no atomics. */
#ifndef UMM_COMMON_HISTOGRAM_OWNED_H
#define UMM_COMMON_HISTOGRAM_OWNED_H

#include "common/histogram.h"

static inline void umm_histogram_record_owned(struct umm_histogram *histogram, uint64_t ns)
{
	uint64_t seen = ns ? ns : 1;
	if (histogram->min == 0 || seen < histogram->min)
		histogram->min = seen;
	if (ns > histogram->max)
		histogram->max = ns;
	histogram->sum += ns;
	histogram->buckets[umm_histogram_bucket(ns)]++;
	histogram->count++;
}

#endif
