/* The wire of postcopy migration: frames, and which of them may come when. Pure functions, no I/O.
 *
 * Two TCP connections, both opened by the destination. DATA carries the stream and all control; URGENT
 * carries requests for single pages and their answers, so that a fault never waits behind the stream.
 *
 *   phase      source                                    destination
 *   ---------  ----------------------------------------  ----------------------------------------------
 *   HELLO                          <- HELLO (DATA) ------  page size it can take
 *              -- WELCOME (DATA) ->                        session, page size, number of pages
 *                                  <- HELLO (URGENT) ----  the same session
 *              -- WELCOME (URGENT) ->
 *   PRECOPY    -- PAGES, ROUND ... ->                      into plain memory; the source's work goes on
 *              [the work stops at a step border]
 *              -- STATE, SWITCH ->                         state of the work, bitmap of missing pages
 *   POSTCOPY                       <- RUNNING ----------   the work goes on here; the source is frozen
 *              (URGENT)            <- REQUEST ----------   one per fault
 *              (URGENT) -- PAGES ->                        the answer, in any order
 *              -- PAGES ... ->                             background stream, next to the last fault first
 *              -- STREAMED ->                              every missing page was sent on DATA or URGENT
 *   VERIFY     -- DIGESTS ... ->                           of the frozen content, every page
 *                                  <- RESULT -----------   pages verified and mismatched
 *   FINISH                         <- FINISH -----------   result of the work (JSON)
 *              -- VERDICT ->                               result of the run that never moved (JSON)
 *   DONE       both close
 *
 * ALIVE may be sent by either side on DATA from POSTCOPY on, and ERROR (text) at any time; after ERROR
 * both close. Anything else, anything out of its phase, a range outside the pages and a length that does not
 * follow from the type are -EPROTO; too long is -EMSGSIZE, a wrong checksum is -EBADMSG: the connection
 * ends, with ERROR to the peer. Silence ends it too: UMM_HANDSHAKE_MS in HELLO, the idle timeout later.
 *
 * Until SWITCH is sent, the source loses nothing when the connection is lost: its work goes on. From SWITCH
 * on it keeps the frozen content until RESULT; a destination that loses it fails the missing pages (readers
 * get SIGBUS, never zeros).
 *
 * A frame: a header of 32 bytes, all little-endian, and `length` bytes:
 *   u32 magic, u8 version, u8 type, u16 flags, u64 first, u32 count, u32 length,
 *   u32 check of these 24 bytes, u32 check of the payload (of PAGES: of the digests)
 * PAGES without flag ZERO: count digests of 8 bytes, then count pages. Checks and digests are XXH3. */
#ifndef UMM_POSTCOPY_PROTOCOL_H
#define UMM_POSTCOPY_PROTOCOL_H

#include <stddef.h>
#include <stdint.h>

enum {
	UMM_FRAME_MAGIC = 0x43504d55, /* "UMPC" */
	UMM_FRAME_VERSION = 1,
	UMM_FRAME_HEADER = 32,
	UMM_FRAME_MAX_DATA = 1 << 20,    /* bytes of pages in one frame (one page, if a page is larger) */
	UMM_FRAME_MAX_DIGESTS = 1 << 16, /* entries in one frame */
	UMM_FRAME_MAX_TEXT = 1 << 16,    /* STATE, FINISH, VERDICT */
	UMM_FRAME_MAX_ERROR = 512,
	UMM_HANDSHAKE_MS = 5000,
};
/* More pages than this are refused before anything is allocated: 64 TiB of 4 KiB pages. The bitmap of
 * such a mapping is 2 GiB, the largest payload that `length` can tell. */
static const uint64_t UMM_PROTOCOL_MAX_PAGES = (uint64_t)1 << 34;

enum umm_frame_type {
	UMM_FRAME_HELLO = 1,
	UMM_FRAME_WELCOME = 2,
	UMM_FRAME_PAGES = 3,
	UMM_FRAME_ROUND = 4,  /* first: round from 1; count: 0 */
	UMM_FRAME_STATE = 5,  /* text */
	UMM_FRAME_SWITCH = 6, /* first: missing pages; payload: the bitmap */
	UMM_FRAME_RUNNING = 7,
	UMM_FRAME_REQUEST = 8, /* first, count */
	UMM_FRAME_STREAMED = 9,
	UMM_FRAME_DIGESTS = 10, /* first, count */
	UMM_FRAME_RESULT = 11,  /* payload: u64 verified, u64 mismatched */
	UMM_FRAME_FINISH = 12,  /* text */
	UMM_FRAME_VERDICT = 13, /* text */
	UMM_FRAME_ALIVE = 14,
	UMM_FRAME_ERROR = 15, /* text; first: errno */
	UMM_FRAME_TYPES = 16,
};

enum umm_frame_flag {
	UMM_FRAME_ZERO = 1 << 0, /* PAGES: the range is zero, no payload */
};

enum umm_phase {
	UMM_PHASE_HELLO,
	UMM_PHASE_PRECOPY,
	UMM_PHASE_POSTCOPY,
	UMM_PHASE_VERIFY,
	UMM_PHASE_FINISH,
	UMM_PHASE_DONE,
	UMM_PHASES,
};

enum umm_side { UMM_SIDE_SOURCE, UMM_SIDE_DESTINATION };
enum umm_connection { UMM_CONNECTION_DATA, UMM_CONNECTION_URGENT };

struct umm_frame {
	uint8_t type;
	uint16_t flags;
	uint64_t first;
	uint32_t count;
	uint32_t length;
	uint32_t payload_check;
};

/* Payloads of HELLO and WELCOME, little-endian on the wire. */
struct umm_hello {
	uint64_t session; /* 0 on DATA */
	uint32_t connection;
	uint32_t page_size;
};
struct umm_welcome {
	uint64_t session;
	uint64_t pages;
	uint32_t page_size;
	uint32_t idle_ms;
};

/* What a receiver of frames knows; decides whether a frame may come. */
struct umm_protocol {
	int side;       /* enum umm_side: who we are */
	int connection; /* enum umm_connection */
	int phase;      /* enum umm_phase */
	uint32_t page_size;
	uint64_t pages;
};

void umm_frame_encode(const struct umm_frame *frame, uint8_t out[UMM_FRAME_HEADER]);
/* Looks at magic, version and the check only. 0, -EPROTO or -EBADMSG. */
int umm_frame_decode(const uint8_t in[UMM_FRAME_HEADER], struct umm_frame *ret);
/* May this frame come now, and are its range and length right? 0, -EPROTO or -EMSGSIZE. */
int umm_protocol_check(const struct umm_protocol *protocol, const struct umm_frame *frame);
/* Bytes of the payload that payload_check covers. */
uint32_t umm_frame_checked_bytes(const struct umm_frame *frame);
uint32_t umm_frame_payload_check(const void *payload, uint32_t len);
const char *umm_frame_name(int type);
const char *umm_phase_name(int phase);
uint64_t umm_page_digest(const void *page, uint32_t page_size);
/* Largest number of pages in one PAGES frame. */
uint32_t umm_frame_max_pages(uint32_t page_size);

#endif
