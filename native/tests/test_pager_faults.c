/* Faults: every byte arrives, whoever asks for it at the same time, and a page that cannot be had is an
 * error. */
#include <signal.h>
#include <sys/wait.h>

#include "tests/pager_fixture.h"

static void every_byte_arrives(uint64_t unit, bool in_thread)
{
	struct fixture f;
	uint64_t size = 4 << 20;
	fixture_open(&f, (struct umm_pager_options){.in_thread = in_thread}, size, unit, UMM_STORE_PRIVATE);
	check_words(f.memory, 0, size, 0);
	struct umm_pager_counters c = counters_of(&f);
	CHECK(c.faults_missing > 0);
	CHECK_EQUAL(c.bytes_fetched, size);
	CHECK_EQUAL(c.resident_bytes, size);
	fixture_close(&f);
}

static void *read_all(void *argument)
{
	struct fixture *f = argument;
	check_words(f->memory, 0, f->size, 0);
	return NULL;
}

/* Eight threads want the same page at the same time: it is fetched once, and all of them go on. */
static void threads_meet_on_pages(bool in_thread)
{
	enum { N = 8 };
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 256 * unit;
	gated_open(&f, (struct umm_pager_options){.in_thread = in_thread}, size, unit, UMM_STORE_PRIVATE,
	        &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	pthread_t threads[N];
	for (int i = 0; i < N; i++)
		CHECK(pthread_create(&threads[i], NULL, read_all, &f) == 0);
	for (int i = 0; i < N; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(store->fetches, size / unit);
	fixture_close(&f);
}

/* Others are served while one fetch hangs, a second fault of the same unit waits for the first. */
static void slow_fetch_holds_up_nobody(void)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 64 * unit;
	gated_open(&f, (struct umm_pager_options){.handlers = 2}, size, unit, UMM_STORE_PRIVATE, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	gate_close(&store->fetch, 0);
	struct access first = {.memory = f.memory, .at = 0}, second = {.memory = f.memory, .at = 8};
	access_start(&first);
	gate_reached(&store->fetch);
	access_start(&second);
	check_words(f.memory, unit, size, 0);
	CHECK(!first.done);
	CHECK(!second.done);
	sem_post(&store->fetch.go);
	access_join(&first);
	access_join(&second);
	CHECK_EQUAL(first.value, word_at(0, 0));
	CHECK_EQUAL(second.value, word_at(8, 0));
	CHECK_EQUAL(store->fetches, size / unit);
	fixture_close(&f);
}

/* Closing waits for the fetch that is under way. */
static void *close_region(void *argument)
{
	struct fixture *f = argument;
	CHECK_OK(umm_region_close(f->region));
	return NULL;
}

static void fetch_against_close(void)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size();
	gated_open(&f, (struct umm_pager_options){.handlers = 2}, 64 * unit, unit, UMM_STORE_PRIVATE, &store);
	gate_close(&store->fetch, 4 * unit);
	CHECK_OK(umm_region_prefetch(f.region, 0, 16 * unit));
	gate_reached(&store->fetch);
	pthread_t closer;
	CHECK(pthread_create(&closer, NULL, close_region, &f) == 0);
	sleep_ms(20);
	sem_post(&store->fetch.go);
	pthread_join(closer, NULL);
	umm_store_put(f.store);
	CHECK_OK(umm_pager_destroy(f.pager));
	munmap(f.bytes, f.size);
}

/* The access ends the process with SIGBUS. */
static void dies_of_sigbus(struct fixture *f, uint64_t at)
{
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		signal(SIGBUS, SIG_DFL);
		(void)load(f->memory, at);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

static void lost_page_is_an_error(uint64_t unit, bool in_thread)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t size = 8 * unit;
	gated_open(&f, (struct umm_pager_options){.in_thread = in_thread}, size, unit, UMM_STORE_PRIVATE,
	        &store);
	umm_store_set_policy(f.store, 2, 0);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	store->fetch_error = EIO;
	CHECK_OK(umm_guard_enter());
	CHECK_OK(umm_guard_enter());
	volatile uint8_t *at = f.memory + unit + 16;
	CHECK_EQUAL(*at, UMM_FILL_BYTE);
	CHECK_EQUAL(f.memory[3 * unit], UMM_FILL_BYTE);
	struct umm_lost lost;
	CHECK_OK(umm_guard_leave(&lost));
	CHECK_EQUAL(lost.units, 0); /* the inner one */
	CHECK_OK(umm_guard_leave(&lost));
	CHECK(lost.region == f.region);
	CHECK_EQUAL(lost.offset, unit + 16);
	CHECK_EQUAL(lost.address, (uint64_t)at);
	CHECK_EQUAL(lost.units, 2);
	CHECK_EQUAL(lost.error, EIO);
	CHECK_EQUAL(store->fetches, 6); /* two units, tried three times each */
	CHECK_EQUAL(counters_of(&f).store_errors, 6);
	CHECK_EQUAL(counters_of(&f).pages_lost, 2);
	CHECK(umm_guard_leave(&lost) == -EINVAL);
	/* Lost stays lost, also when the store is well again; what was not asked for yet can be had. */
	store->fetch_error = 0;
	CHECK_OK(umm_guard_enter());
	CHECK_EQUAL(*at, UMM_FILL_BYTE);
	CHECK_OK(umm_guard_leave(&lost));
	CHECK_EQUAL(lost.units, 1);
	CHECK(umm_region_populate(f.region, unit, unit) == -EIO);
	check_words(f.memory, 0, unit, 0);
	if (!SLOWDOWN || SLOWDOWN == 1)
		dies_of_sigbus(&f, unit);
	/* Removed by the user, it is a page like any other again. */
	CHECK(madvise((void *)(f.memory + unit), unit, MADV_DONTNEED) == 0);
	check_zeros(f.memory, unit, 2 * unit);
	fixture_close(&f);
}

/* Lost pages of two pagers in one guard, and the first region closed before it ends. */
static void guard_spans_pagers(void)
{
	struct fixture f, g;
	struct gated_store *one, *two;
	uint64_t unit = page_size();
	gated_open(&f, (struct umm_pager_options){0}, 8 * unit, unit, UMM_STORE_PRIVATE, &one);
	gated_open(&g, (struct umm_pager_options){0}, 8 * unit, unit, UMM_STORE_PRIVATE, &two);
	one->fetch_error = two->fetch_error = EIO;
	struct umm_lost lost;
	CHECK_OK(umm_guard_enter());
	CHECK_EQUAL(f.memory[0], UMM_FILL_BYTE);
	CHECK_EQUAL(g.memory[0], UMM_FILL_BYTE);
	fixture_close(&f);
	CHECK_OK(umm_guard_leave(&lost));
	CHECK_EQUAL(lost.units, 2);
	/* The fill is gone: another guard meets the loss again. */
	CHECK_OK(umm_guard_enter());
	CHECK_EQUAL(g.memory[0], UMM_FILL_BYTE);
	CHECK_OK(umm_guard_leave(&lost));
	CHECK_EQUAL(lost.units, 1);
	fixture_close(&g);
}

/* A failed read-ahead loses nothing: the access tries again. */
static void failed_prefetch_is_forgotten(void)
{
	struct fixture f;
	struct gated_store *store;
	uint64_t unit = page_size(), size = 32 * unit;
	gated_open(&f, (struct umm_pager_options){0}, size, unit, UMM_STORE_PRIVATE, &store);
	CHECK_OK(umm_region_advise(f.region, UMM_REGION_RANDOM));
	store->fetch_error = EIO;
	CHECK_OK(umm_region_prefetch(f.region, 0, size));
	while (counters_of(&f).store_errors == 0)
		sleep_ms(1);
	store->fetch_error = 0;
	check_words(f.memory, 0, size, 0);
	CHECK_EQUAL(counters_of(&f).pages_lost, 0);
	fixture_close(&f);
}

int main(void)
{
	uint64_t page = page_size();
	for (int in_thread = 0; in_thread <= 1; in_thread++) {
		RUN(every_byte_arrives(page, in_thread));
		RUN(every_byte_arrives(64 << 10, in_thread));
		RUN(every_byte_arrives(2 << 20, in_thread));
		RUN(threads_meet_on_pages(in_thread));
		RUN(lost_page_is_an_error(page, in_thread));
		RUN(lost_page_is_an_error(64 << 10, in_thread));
	}
	RUN(slow_fetch_holds_up_nobody());
	RUN(fetch_against_close());
	RUN(guard_spans_pagers());
	RUN(failed_prefetch_is_forgotten());
	return 0;
}
