"""What to do about a finding, in the words of the linker's options."""

from __future__ import annotations

# The largest base page of arm64: a file linked for it loads with the smaller ones as well.
LARGEST = 0x10000

MAX_PAGE_SIZE = f"link with -Wl,-z,max-page-size={LARGEST:#x}"
# patchelf before 0.15 adds LOADs for pages of its own machine to files whose other LOADs are right.
PATCHELF = f"{MAX_PAGE_SIZE}, and where patchelf added the LOAD, use a newer one or --page-size {LARGEST}"
RELRO = f"link with -Wl,-z,max-page-size={LARGEST:#x},-z,common-page-size={LARGEST:#x}"
JEMALLOC = "configure jemalloc with --with-lg-page=16 (Rust: JEMALLOC_SYS_WITH_LG_PAGE=16)"
BROKEN = "build or fetch the file again"
