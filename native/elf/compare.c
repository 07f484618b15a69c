/* Compares the memory of a stopped process with the ELF file that was loaded into it. */
#define _GNU_SOURCE
#include "compare.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 1 << 16, MAX_LINES = 200, MAX_HEADERS = 1170 };

struct range {
	uint64_t start, end;
};

struct mapping {
	uint64_t start, end, offset;
	int rights;
	int of_file;
};

struct comparison {
	FILE *out;
	const uint8_t *file;
	uint64_t file_size;
	const Elf64_Phdr *headers;
	size_t header_count;
	struct range relro;
	struct range *changed; /* what the loader writes: relocated words, the dynamic section */
	size_t changed_count, changed_capacity;
	struct mapping *maps;
	size_t map_count, map_capacity;
	int memory;
	uint64_t bias, page;
	int lines;
};

static uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

static int grow(void **array, size_t *capacity, size_t count, size_t size)
{
	if (count < *capacity)
		return 0;
	size_t wanted = *capacity ? *capacity * 2 : 64;
	void *larger = reallocarray(*array, wanted, size);
	if (!larger)
		return -ENOMEM;
	*array = larger;
	*capacity = wanted;
	return 0;
}

static int add_changed(struct comparison *c, uint64_t start, uint64_t length)
{
	int err = grow((void **)&c->changed, &c->changed_capacity, c->changed_count, sizeof(*c->changed));
	if (err)
		return err;
	c->changed[c->changed_count++] = (struct range){start, start + length};
	return 0;
}

/* The bytes of the file that an address stands for, NULL when `length` bytes are not there. */
static const void *at_address(const struct comparison *c, uint64_t address, uint64_t length)
{
	for (size_t i = 0; i < c->header_count; i++) {
		const Elf64_Phdr *ph = &c->headers[i];
		if (ph->p_type != PT_LOAD || address < ph->p_vaddr || address - ph->p_vaddr > ph->p_filesz ||
		        length > ph->p_filesz - (address - ph->p_vaddr))
			continue;
		uint64_t offset = ph->p_offset + (address - ph->p_vaddr);
		if (offset <= c->file_size && length <= c->file_size - offset)
			return c->file + offset;
	}
	return NULL;
}

static int add_rela(struct comparison *c, uint64_t address, uint64_t size)
{
	const Elf64_Rela *rela = at_address(c, address, size);
	for (size_t i = 0; rela && i < size / sizeof(*rela); i++) {
		int words = ELF64_R_TYPE(rela[i].r_info) == R_AARCH64_TLSDESC ? 2 : 1;
		int err = add_changed(c, rela[i].r_offset, 8 * words);
		if (err)
			return err;
	}
	return 0;
}

static int add_relr(struct comparison *c, uint64_t address, uint64_t size)
{
	const uint64_t *relr = at_address(c, address, size);
	uint64_t where = 0;
	int err = 0;
	for (size_t i = 0; relr && !err && i < size / sizeof(*relr); i++) {
		if (!(relr[i] & 1)) {
			err = add_changed(c, relr[i], 8);
			where = relr[i] + 8;
			continue;
		}
		for (int bit = 1; bit < 64 && !err; bit++)
			if (relr[i] >> bit & 1)
				err = add_changed(c, where + 8 * (bit - 1), 8);
		where += 8 * 63;
	}
	return err;
}

static int by_start(const void *a, const void *b)
{
	const struct range *x = a, *y = b;
	return x->start < y->start ? -1 : x->start > y->start;
}

/* What the loader changes in memory by right. */
static int find_changed(struct comparison *c)
{
	const Elf64_Phdr *dynamic = NULL;
	for (size_t i = 0; i < c->header_count; i++)
		if (c->headers[i].p_type == PT_DYNAMIC)
			dynamic = &c->headers[i];
	if (!dynamic)
		return 0;
	/* glibc adds the load address to pointers in it, and DT_DEBUG is there to be written. */
	int err = add_changed(c, dynamic->p_vaddr, dynamic->p_memsz);
	const Elf64_Dyn *entry = at_address(c, dynamic->p_vaddr, dynamic->p_filesz);
	uint64_t value[64] = {0};
	for (size_t i = 0; entry && i < dynamic->p_filesz / sizeof(*entry) && entry[i].d_tag; i++)
		if (entry[i].d_tag > 0 && entry[i].d_tag < 64)
			value[entry[i].d_tag] = entry[i].d_un.d_val;
	if (!err && value[DT_PLTGOT])
		err = add_changed(c, value[DT_PLTGOT], 3 * 8);
	if (!err)
		err = add_rela(c, value[DT_RELA], value[DT_RELASZ]);
	if (!err)
		err = add_rela(c, value[DT_JMPREL], value[DT_PLTRELSZ]);
	if (!err)
		err = add_relr(c, value[DT_RELR], value[DT_RELRSZ]);
	if (!err && c->changed_count)
		qsort(c->changed, c->changed_count, sizeof(*c->changed), by_start);
	return err;
}

static int is_changed(const struct comparison *c, uint64_t address)
{
	size_t low = 0, high = c->changed_count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (c->changed[middle].start <= address)
			low = middle + 1;
		else
			high = middle;
	}
	/* The dynamic section is the only one that is longer than two words; others may begin inside it. */
	for (size_t back = 0; back < 4096 /* no page size: entries of a section */ && back < low; back++)
		if (address < c->changed[low - 1 - back].end)
			return 1;
	return 0;
}

static int read_maps(struct comparison *c, pid_t pid, const char *path)
{
	char name[64], line[PATH_MAX + 200];
	snprintf(name, sizeof(name), "/proc/%d/maps", pid);
	FILE *file = fopen(name, "re");
	if (!file)
		return -errno;
	int err = 0;
	while (!err && fgets(line, sizeof(line), file)) {
		unsigned long long start, end, offset;
		char rights[5];
		int at = 0;
		if (sscanf(line, "%llx-%llx %4s %llx %*s %*s %n", &start, &end, rights, &offset, &at) < 4)
			continue;
		line[strcspn(line, "\n")] = '\0';
		err = grow((void **)&c->maps, &c->map_capacity, c->map_count, sizeof(*c->maps));
		if (err)
			break;
		c->maps[c->map_count++] = (struct mapping){start, end, offset,
		        (rights[0] == 'r') * PF_R | (rights[1] == 'w') * PF_W | (rights[2] == 'x') * PF_X,
		        at > 0 && !strcmp(line + at, path)};
	}
	fclose(file);
	return err;
}

static int tell(struct comparison *c)
{
	return c->lines++ < MAX_LINES;
}

static void check_rights(struct comparison *c, uint64_t start, uint64_t end, int wanted, int has)
{
	/* RELRO is only read once it is protected; that it is not protected is a lesser matter. */
	uint64_t low = max_u64(start, c->relro.start), high = min_u64(end, c->relro.end);
	if (low < high && wanted & PF_W) {
		if (start < low)
			check_rights(c, start, low, wanted, has);
		if (high < end)
			check_rights(c, high, end, wanted, has);
		start = low;
		end = high;
		wanted = PF_R;
	}
	if (wanted & ~has && tell(c))
		fprintf(c->out, "lacks %lx %lx %d %d\n", start, end - start, wanted, has);
	else if (has & ~wanted & PF_W && tell(c))
		fprintf(c->out, "extra %lx %lx %d %d\n", start, end - start, wanted, has);
}

static void tell_run(struct comparison *c, const char *what, uint64_t *start, uint64_t end)
{
	if (*start != UINT64_MAX && tell(c))
		fprintf(c->out, "%s %lx %lx\n", what, *start, end - *start);
	*start = UINT64_MAX;
}

/*
 * Whether the page of an address holds bytes of another segment. In a page of its own, data that differs was
 * written by the program itself (its constructors have run): the mapping was compared by its offset.
 */
static int is_shared(const struct comparison *c, const Elf64_Phdr *ph, uint64_t address)
{
	uint64_t page = address & -c->page;
	for (size_t i = 0; i < c->header_count; i++) {
		const Elf64_Phdr *other = &c->headers[i];
		if (other != ph && other->p_type == PT_LOAD && other->p_vaddr < page + c->page &&
		        page < other->p_vaddr + other->p_memsz)
			return 1;
	}
	return 0;
}

/* Content of the addresses from start to end, all mapped, of one segment. */
static void check_bytes(struct comparison *c, const Elf64_Phdr *ph, uint64_t start, uint64_t end)
{
	uint8_t buffer[CHUNK];
	uint64_t file_end = ph->p_vaddr + ph->p_filesz, differs = UINT64_MAX;
	const char *what = "bytes";
	if (!(ph->p_flags & PF_W))
		end = min_u64(end, file_end); /* nobody promises zeros there */
	for (uint64_t at = start; at < end;) {
		uint64_t length = min_u64(end - at, CHUNK);
		if (at < file_end)
			length = min_u64(length, file_end - at);
		ssize_t got = pread(c->memory, buffer, length, (off_t)(c->bias + at));
		if (got <= 0) {
			tell_run(c, what, &differs, at);
			if (tell(c))
				fprintf(c->out, "bytes %lx %lx\n", at, length); /* SIGBUS: past the file */
			at += length;
			continue;
		}
		const char *now = at < file_end ? "bytes" : "zeros";
		if (now != what)
			tell_run(c, what, &differs, at);
		what = now;
		for (ssize_t i = 0; i < got; i++) {
			uint64_t offset = ph->p_offset + (at + i - ph->p_vaddr);
			uint8_t wanted = at < file_end && offset < c->file_size ? c->file[offset] : 0;
			int same = buffer[i] == wanted || is_changed(c, at + i) ||
			           (ph->p_flags & PF_W && !is_shared(c, ph, at + i));
			if (same)
				tell_run(c, what, &differs, at + i);
			else if (differs == UINT64_MAX)
				differs = at + i;
		}
		at += got;
	}
	tell_run(c, what, &differs, end);
}

static void check_segment(struct comparison *c, const Elf64_Phdr *ph)
{
	uint64_t position = ph->p_vaddr, end = ph->p_vaddr + ph->p_memsz;
	for (size_t i = 0; i < c->map_count && position < end; i++) {
		const struct mapping *map = &c->maps[i];
		uint64_t low = max_u64(map->start, c->bias + position),
		         high = min_u64(map->end, c->bias + end);
		if (low >= high)
			continue;
		low -= c->bias;
		high -= c->bias;
		if (low > position && tell(c))
			fprintf(c->out, "unmapped %lx %lx\n", position, low - position);
		position = high;
		check_rights(c, low, high, ph->p_flags & 7, map->rights);
		uint64_t file_end = min_u64(high, ph->p_vaddr + ph->p_filesz);
		uint64_t offset = map->offset + (c->bias + low - map->start);
		if (low < file_end && (!map->of_file || offset != ph->p_offset + (low - ph->p_vaddr)) &&
		        tell(c))
			fprintf(c->out, "source %lx %lx %lx\n", low, file_end - low, offset);
		check_bytes(c, ph, low, high);
	}
	if (position < end && tell(c))
		fprintf(c->out, "unmapped %lx %lx\n", position, end - position);
}

/* RELRO that goes past the LOADs, in whole pages: what lies there was made read-only, whosever it is. */
static void check_beyond(struct comparison *c)
{
	uint64_t page = c->page, end = 0, relro_end = c->relro.end & -page;
	for (size_t i = 0; i < c->header_count; i++)
		if (c->headers[i].p_type == PT_LOAD)
			end = max_u64(
			        end, (c->headers[i].p_vaddr + c->headers[i].p_memsz + page - 1) & -page);
	if (c->relro.start / page != c->relro.end / page && relro_end > end && tell(c))
		fprintf(c->out, "beyond %lx %lx\n", end, relro_end - end);
}

static int compare_open(struct comparison *c, pid_t pid, const char *path)
{
	const Elf64_Ehdr *header = (const void *)c->file;
	char name[64];
	if (c->file_size < sizeof(*header) || header->e_ident[EI_CLASS] != ELFCLASS64 ||
	        header->e_phentsize != sizeof(Elf64_Phdr) || header->e_phnum > MAX_HEADERS ||
	        header->e_phoff > c->file_size ||
	        header->e_phnum * sizeof(Elf64_Phdr) > c->file_size - header->e_phoff)
		return -ENOEXEC;
	c->headers = (const void *)(c->file + header->e_phoff);
	c->header_count = header->e_phnum;
	for (size_t i = 0; i < c->header_count; i++)
		if (c->headers[i].p_type == PT_GNU_RELRO)
			c->relro = (struct range){
			        c->headers[i].p_vaddr, c->headers[i].p_vaddr + c->headers[i].p_memsz};
	int err = read_maps(c, pid, path);
	if (!err)
		err = find_changed(c);
	if (err)
		return err;
	snprintf(name, sizeof(name), "/proc/%d/mem", pid);
	c->memory = open(name, O_RDONLY | O_CLOEXEC);
	if (c->memory < 0)
		return -errno;
	for (size_t i = 0; i < c->header_count; i++)
		if (c->headers[i].p_type == PT_LOAD && c->headers[i].p_memsz)
			check_segment(c, &c->headers[i]);
	close(c->memory);
	check_beyond(c);
	return 0;
}

int umm_elf_compare(pid_t pid, const char *path, uint64_t bias, FILE *out)
{
	struct comparison c = {
	        .out = out, .bias = bias, .memory = -1, .page = (uint64_t)sysconf(_SC_PAGESIZE)};
	struct stat status;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	int err = fstat(fd, &status) ? -errno : 0;
	c.file_size = err ? 0 : (uint64_t)status.st_size;
	if (!err && c.file_size) {
		c.file = mmap(NULL, c.file_size, PROT_READ, MAP_PRIVATE, fd, 0);
		err = c.file == MAP_FAILED ? -errno : compare_open(&c, pid, path);
		if (c.file != MAP_FAILED)
			munmap((void *)c.file, c.file_size);
	}
	close(fd);
	free(c.changed);
	free(c.maps);
	return err;
}
