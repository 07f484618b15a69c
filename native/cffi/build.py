"""Write the C source of uspace_mm._native from the declarations in native/cffi/*.cdef.

A .cdef file is what cffi parses, plus `#include` lines, which are moved to the C source.
Usage: build.py OUTPUT THIS_FILE CDEF...
"""

import sys
from pathlib import Path

from cffi import FFI


def main(output: str, cdefs: list[str]) -> None:
    ffi = FFI()
    includes: list[str] = []
    for name in cdefs:
        declarations: list[str] = []
        for line in Path(name).read_text().splitlines():
            (includes if line.startswith("#include") else declarations).append(line)
        ffi.cdef("\n".join(declarations))
    ffi.set_source("uspace_mm._native", "\n".join(includes))
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
