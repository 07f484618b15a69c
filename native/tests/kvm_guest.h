/* The guest of test_notifier_kvm: reads and writes words of its RAM for ever, and knows what each must be.
 *
 * Each page of the RAM has a stamp of each vCPU's own, that names the page and a version. The host says
 * through the page's epoch what it does: odd while it takes the page's content away, even after; all ones
 * when the page has been unmapped. So a stamp is the version that the vCPU wrote last, or zero where the
 * epoch changed. Anything else is stale or foreign, and reported. */
#ifndef UMM_TESTS_KVM_GUEST_H
#define UMM_TESTS_KVM_GUEST_H

#include <stdint.h>

enum {
	/* Written by the guest; there is no slot, so it exits. */
	GUEST_DONE = 0x8000000,
	GUEST_WRONG = 0x8000004,
	GUEST_STAMP_SHIFT = 20, /* bits of the version */
};
static const uint32_t guest_gone = 0xdeadbeef, guest_unmapped = UINT32_MAX;

/* What RSI points to. Addresses are guest physical. */
struct guest_parameters {
	uint32_t seed, pages_mask, page_bytes;
	uint32_t ram;                         /* of the vCPU's word in the first page */
	uint32_t epochs;                      /* uint32_t of each page */
	uint32_t words;                       /* struct guest_word of each page */
	uint32_t gone;                        /* guest_gone: what reads of unmapped memory answer */
	uint32_t stop;                        /* set by the host */
	uint32_t reads, writes, zeros, gones; /* counted by the guest */
};

struct guest_word {
	uint32_t value;   /* what was written or seen last */
	uint32_t seen;    /* in this epoch */
	uint32_t version; /* that was written last */
	uint32_t raced;   /* written as the content was taken away: it may have stayed */
};

/* 64-bit code without a stack. EAX: the stamp; EBX: the page; RCX: where its epoch is; EDX: the epoch before
 * the read; RDI: where the stamp is; RBP: the struct guest_word. */
/* clang-format off */
static const uint8_t guest_program[] = {
	/* again: */
	0x69, 0x06, 0x0d, 0x66, 0x19, 0x00,         /* imul eax, [rsi+SEED], 1664525 */
	0x05, 0x5f, 0xf3, 0x6e, 0x3c,               /* add eax, 1013904223 */
	0x89, 0x06,                                 /* mov [rsi+SEED], eax; a random page */
	0x89, 0xc3,                                 /* mov ebx, eax */
	0xc1, 0xeb, 0x08,                           /* shr ebx, 8 */
	0x23, 0x5e, 0x04,                           /* and ebx, [rsi+PAGES_MASK] */
	0x89, 0xdf,                                 /* mov edi, ebx */
	0x0f, 0xaf, 0x7e, 0x08,                     /* imul edi, [rsi+PAGE] */
	0x03, 0x7e, 0x0c,                           /* add edi, [rsi+RAM]; our word of it */
	0x89, 0xdd,                                 /* mov ebp, ebx */
	0xc1, 0xe5, 0x04,                           /* shl ebp, 4 */
	0x03, 0x6e, 0x14,                           /* add ebp, [rsi+WORDS]; what we know of that */
	0x8b, 0x4e, 0x10,                           /* mov ecx, [rsi+EPOCHS] */
	0x8d, 0x0c, 0x99,                           /* lea ecx, [rcx+rbx*4]; and its epoch */
	0x8b, 0x11,                                 /* mov edx, [rcx]; before the word */
	0x8b, 0x07,                                 /* mov eax, [rdi]; the word */
	0xff, 0x46, 0x20,                           /* inc [rsi+OPS] */
	0x3b, 0x46, 0x18,                           /* cmp eax, [rsi+GONE] */
	0x74, 0x7a,                                 /* je gone; what is unmapped answers so */
	0x83, 0xfa, 0xff,                           /* cmp edx, -1; unmapped before: nothing else may */
	0x0f, 0x84, 0x8f, 0x00, 0x00, 0x00,         /* je fail */
	0xf6, 0xc2, 0x01,                           /* test dl, 1; odd: it is being removed */
	0x75, 0x5c,                                 /* jnz changing */
	0x3b, 0x11,                                 /* cmp edx, [rcx] */
	0x75, 0x58,                                 /* jne changing */
	0x3b, 0x55, 0x04,                           /* cmp edx, [rbp+SEEN]; when we looked last */
	0x74, 0x1c,                                 /* je same */
	0x85, 0xc0,                                 /* test eax, eax */
	0x74, 0x0b,                                 /* jz establish; zero, as it was removed */
	0x83, 0x7d, 0x0c, 0x00,                     /* cmp [rbp+RACED], 0; or written as it was removed */
	0x74, 0x77,                                 /* je fail */
	0x3b, 0x45, 0x00,                           /* cmp eax, [rbp+VALUE] */
	0x75, 0x72,                                 /* jne fail */
	/* establish: */
	0x89, 0x45, 0x00,                           /* mov [rbp+VALUE], eax */
	0x89, 0x55, 0x04,                           /* mov [rbp+SEEN], edx */
	0xc7, 0x45, 0x0c, 0x00, 0x00, 0x00, 0x00,   /* mov [rbp+RACED], 0 */
	/* same: */
	0x3b, 0x45, 0x00,                           /* cmp eax, [rbp+VALUE] */
	0x75, 0x60,                                 /* jne fail */
	0xf6, 0x46, 0x03, 0x40,                     /* test byte [rsi+SEED+3], 0x40; every other time, write */
	0x74, 0x44,                                 /* jz next */
	0xff, 0x45, 0x08,                           /* inc [rbp+VERSION] */
	0x8d, 0x43, 0x01,                           /* lea eax, [rbx+1]; a stamp: page and version */
	0xc1, 0xe0, 0x14,                           /* shl eax, 20 */
	0x8b, 0x5d, 0x08,                           /* mov ebx, [rbp+VERSION] */
	0x81, 0xe3, 0xff, 0xff, 0x0f, 0x00,         /* and ebx, 0xfffff */
	0x09, 0xd8,                                 /* or eax, ebx */
	0x89, 0x45, 0x00,                           /* mov [rbp+VALUE], eax */
	0x89, 0x07,                                 /* mov [rdi], eax */
	0x0f, 0xae, 0xf0,                           /* mfence; before the epoch is read */
	0xff, 0x46, 0x24,                           /* inc [rsi+WRITES] */
	0x3b, 0x11,                                 /* cmp edx, [rcx] */
	0x74, 0x21,                                 /* je next */
	0xc7, 0x45, 0x0c, 0x01, 0x00, 0x00, 0x00,   /* mov [rbp+RACED], 1; it may be lost */
	0xeb, 0x18,                                 /* jmp next */
	/* changing: */
	0x85, 0xc0,                                 /* test eax, eax */
	0x74, 0x07,                                 /* jz zero */
	0x3b, 0x45, 0x00,                           /* cmp eax, [rbp+VALUE] */
	0x75, 0x25,                                 /* jne fail */
	0xeb, 0x0d,                                 /* jmp next */
	/* zero: */
	0xff, 0x46, 0x28,                           /* inc [rsi+ZEROS] */
	0xeb, 0x08,                                 /* jmp next */
	/* gone: */
	0xf6, 0x01, 0x01,                           /* test byte [rcx], 1; only while or after it is unmapped */
	0x74, 0x19,                                 /* jz fail */
	0xff, 0x46, 0x2c,                           /* inc [rsi+GONES] */
	/* next: */
	0x83, 0x7e, 0x1c, 0x00,                     /* cmp [rsi+STOP], 0 */
	0x0f, 0x84, 0x3c, 0xff, 0xff, 0xff,         /* je again */
	0xbf, 0x00, 0x00, 0x00, 0x08,               /* mov edi, 0x8000000; GUEST_DONE */
	0x89, 0x07,                                 /* mov [rdi], eax */
	0xe9, 0x30, 0xff, 0xff, 0xff,               /* jmp again */
	/* fail: */
	0xbf, 0x04, 0x00, 0x00, 0x08,               /* mov edi, 0x8000004; GUEST_WRONG */
	0x89, 0x07,                                 /* mov [rdi], eax */
	0xe9, 0x24, 0xff, 0xff, 0xff,               /* jmp again */
};
/* clang-format on */

#endif
