"""The page-size audit of ELF files: which base page sizes a binary loads and works on."""
