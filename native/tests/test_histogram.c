/* Buckets are seamless, quantiles are within 1/32, and adding adds. */
#include "common/histogram.h"

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);              \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)

static void buckets_are_seamless(void)
{
	uint64_t before = 0;
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++) {
		uint64_t low, high;
		umm_histogram_bounds(i, &low, &high);
		CHECK(low == before);
		CHECK(high > low);
		CHECK(umm_histogram_bucket(low) == i);
		CHECK(umm_histogram_bucket(high - 1) == i);
		CHECK(low < 32 || (high - low) * 32 <= low);
		before = high;
	}
	CHECK(before == UINT64_C(1) << 42);
	CHECK(umm_histogram_bucket(UINT64_MAX) == UMM_HISTOGRAM_BUCKETS - 1);
}

static void quantiles_are_near(void)
{
	static struct umm_histogram histogram;
	CHECK(umm_histogram_quantile(&histogram, 0.5) == 0);
	for (uint64_t ns = 1; ns <= 100000; ns++)
		umm_histogram_record(&histogram, ns);
	CHECK(histogram.count == 100000);
	CHECK(histogram.min == 1);
	CHECK(histogram.max == 100000);
	CHECK(histogram.sum == UINT64_C(100000) * 100001 / 2);
	const double fractions[] = {0.01, 0.5, 0.9, 0.99, 0.999};
	for (unsigned i = 0; i < sizeof(fractions) / sizeof(fractions[0]); i++) {
		double exact = fractions[i] * 100000;
		double got = (double)umm_histogram_quantile(&histogram, fractions[i]);
		CHECK(got >= exact && got <= exact * (1 + 1.0 / 32) + 1);
	}
	CHECK(umm_histogram_quantile(&histogram, 1.0) == 100000);
	CHECK(umm_histogram_quantile(&histogram, 0.0) == 1);
}

static void adding_adds(void)
{
	static struct umm_histogram a, b, empty;
	umm_histogram_record(&a, 10);
	umm_histogram_record(&b, 7);
	umm_histogram_record(&b, 1000000);
	umm_histogram_add(&a, &b);
	CHECK(a.count == 3 && a.sum == 1000017 && a.min == 7 && a.max == 1000000);
	umm_histogram_add(&a, &empty);
	CHECK(a.count == 3 && a.min == 7);
	umm_histogram_add(&empty, &a);
	CHECK(empty.count == 3 && empty.min == 7 && empty.max == 1000000);
}

int main(void)
{
	buckets_are_seamless();
	quantiles_are_near();
	adding_adds();
	return 0;
}
