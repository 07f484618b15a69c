/* The histogram: buckets tile the values, their error is bounded, quantiles agree with sorted values. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/histogram.h"

#define CHECK(condition, ...)                                                                                \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                      \
			fprintf(stderr, __VA_ARGS__);                                                        \
			fputc('\n', stderr);                                                                 \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)

typedef unsigned long long ull;

static const uint64_t limit = 1ull << 42;

static void test_buckets_tile_the_values(void)
{
	uint64_t expected_low = 0;
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++) {
		uint64_t low, high;
		umm_histogram_bounds(i, &low, &high);
		CHECK(low == expected_low, "bucket %u begins at %llu, the one before ended at %llu", i,
		        (ull)low, (ull)expected_low);
		CHECK(high > low, "bucket %u is empty", i);
		CHECK(umm_histogram_bucket(low) == i, "low edge of %u is in %u", i,
		        umm_histogram_bucket(low));
		CHECK(umm_histogram_bucket(high - 1) == i, "high edge of %u is in %u", i,
		        umm_histogram_bucket(high - 1));
		CHECK((high - low) * 32 <= low || high - low == 1,
		        "bucket %u of width %llu at %llu errs by more than 1/32", i, (ull)(high - low),
		        (ull)low);
		expected_low = high;
	}
	CHECK(expected_low == limit, "the buckets end at %llu", (ull)expected_low);
	CHECK(umm_histogram_bucket(limit) == UMM_HISTOGRAM_BUCKETS - 1, "2^42 is not in the last bucket");
	CHECK(umm_histogram_bucket(UINT64_MAX) == UMM_HISTOGRAM_BUCKETS - 1,
	        "2^64 - 1 is not in the last bucket");
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static void test_quantiles_against_sorted_values(void)
{
	enum { N = 20000 };
	static uint64_t values[N];
	static struct umm_histogram h;
	uint64_t state = 88172645463325252ull, sum = 0;
	memset(&h, 0, sizeof(h));
	for (unsigned i = 0; i < N; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		/* Every magnitude from 1 ns to seconds. */
		values[i] = 1 + (state >> 30) % (1ull << (1 + state % 33));
		sum += values[i];
		umm_histogram_record(&h, values[i]);
	}
	qsort(values, N, sizeof(values[0]), compare);
	CHECK(h.count == N && h.sum == sum, "count %llu, sum %llu", (ull)h.count, (ull)h.sum);
	CHECK(h.min == values[0] && h.max == values[N - 1], "min %llu, max %llu", (ull)h.min, (ull)h.max);
	static const double quantiles[] = {0.0, 0.001, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0};
	for (unsigned i = 0; i < sizeof(quantiles) / sizeof(quantiles[0]); i++) {
		double rank = ceil(quantiles[i] * N);
		uint64_t exact = values[rank < 1 ? 0 : (unsigned)rank - 1];
		uint64_t got = umm_histogram_quantile(&h, quantiles[i]);
		CHECK(got >= exact && (double)got <= (double)exact * (1 + 1.0 / 32),
		        "quantile %g: %llu, exactly %llu", quantiles[i], (ull)got, (ull)exact);
	}
	CHECK(umm_histogram_quantile(&h, 1.0) == h.max, "the last quantile is not the maximum");
}

static void test_edges(void)
{
	static struct umm_histogram h, other;
	memset(&h, 0, sizeof(h));
	memset(&other, 0, sizeof(other));
	CHECK(umm_histogram_quantile(&h, 0.5) == 0, "an empty histogram has a median");
	umm_histogram_record(&h, 0);
	CHECK(h.count == 1 && h.sum == 0 && h.max == 0, "a record of 0 ns");
	CHECK(umm_histogram_quantile(&h, 0.5) == 0, "median of a single 0");
	umm_histogram_record(&other, UINT64_MAX);
	CHECK(other.max == UINT64_MAX && other.buckets[UMM_HISTOGRAM_BUCKETS - 1] == 1,
	        "a record beyond the range");
	umm_histogram_add(&h, &other);
	CHECK(h.count == 2 && h.max == UINT64_MAX && h.min == 1, "sum of two: count %llu, min %llu",
	        (ull)h.count, (ull)h.min);
	umm_histogram_add(&h, &(struct umm_histogram){0});
	CHECK(h.count == 2 && h.min == 1, "an empty histogram changes a sum");
}

static void *record_many(void *arg)
{
	for (unsigned i = 1; i <= 50000; i++)
		umm_histogram_record(arg, i);
	return NULL;
}

static void test_concurrent_records_are_all_counted(void)
{
	static struct umm_histogram h;
	pthread_t thread[4];
	memset(&h, 0, sizeof(h));
	for (unsigned i = 0; i < 4; i++)
		CHECK(pthread_create(&thread[i], NULL, record_many, &h) == 0, "thread %u", i);
	for (unsigned i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
	uint64_t counted = 0;
	for (unsigned i = 0; i < UMM_HISTOGRAM_BUCKETS; i++)
		counted += h.buckets[i];
	CHECK(h.count == 200000 && counted == 200000, "%llu records, %llu in buckets", (ull)h.count,
	        (ull)counted);
	CHECK(h.min == 1 && h.max == 50000, "min %llu, max %llu", (ull)h.min, (ull)h.max);
	CHECK(h.sum == 4ull * 50000 * 50001 / 2, "sum %llu", (ull)h.sum);
}

int main(void)
{
	test_buckets_tile_the_values();
	test_quantiles_against_sorted_values();
	test_edges();
	test_concurrent_records_are_all_counted();
	return 0;
}
