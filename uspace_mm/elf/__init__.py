"""Which ELF files load on kernels with 4K, 16K and 64K pages, judged from their program headers."""
