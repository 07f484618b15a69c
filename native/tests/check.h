/* Assertions of the C tests: say what failed and where, and end the program. */
#ifndef UMM_TESTS_CHECK_H
#define UMM_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__,             \
			        #condition);                                                                 \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

#define CHECK_OK(call)                                                                                       \
	do {                                                                                                 \
		int check_err = (call);                                                                      \
		if (check_err) {                                                                             \
			fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, __func__, #call,          \
			        strerror(-check_err));                                                       \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

#define CHECK_EQUAL(a, b)                                                                                    \
	do {                                                                                                 \
		long long check_a = (long long)(a), check_b = (long long)(b);                                \
		if (check_a != check_b) {                                                                    \
			fprintf(stderr, "%s:%d: %s: %s is %lld, %s is %lld\n", __FILE__, __LINE__, __func__, \
			        #a, check_a, #b, check_b);                                                   \
			abort();                                                                             \
		}                                                                                            \
	} while (0)

enum { TEST_SKIPPED = 77 };

#endif
