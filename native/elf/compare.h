/* Compares the memory of a stopped process with the ELF file that was loaded into it. */
#ifndef UMM_ELF_COMPARE_H
#define UMM_ELF_COMPARE_H

#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

/*
 * Writes to `out` a line per difference between the segments of the file at `path` and the memory of `pid`,
 * where the file's address 0 lies at `bias`:
 *
 *   lacks ADDRESS LENGTH WANTED HAS    a right that the file asks for is missing (r, w, x as a number, 4 2 1)
 *   extra ADDRESS LENGTH WANTED HAS    data that is not written, or RELRO, can be written
 *   unmapped ADDRESS LENGTH
 *   source ADDRESS LENGTH OFFSET       mapped from another place of the file than the header says
 *   bytes ADDRESS LENGTH               other content: read-only memory, or data in a page that segments share
 *   zeros ADDRESS LENGTH               the same for the zeros after the file's bytes
 *   beyond ADDRESS LENGTH              RELRO goes on behind the last segment
 *
 * Addresses are those of the file, in hexadecimal. Returns 0, or a negative errno when the comparison was not
 * possible.
 */
int umm_elf_compare(pid_t pid, const char *path, uint64_t bias, FILE *out);

#endif
