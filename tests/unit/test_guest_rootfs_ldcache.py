"""The cache of the loader that we write: its order, against the host's own ldconfig, and its bytes."""

from __future__ import annotations

import functools
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from uspace_mm.guest.rootfs import ldcache

# The first 20 bytes of an ELF file for aarch64: a shared library.
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 183)
LIBRARIES = "usr/lib/aarch64-linux-gnu"


def entries(root: Path) -> list[tuple[str, str]]:
    """Read the file as glibc's dl-cache.h describes it."""
    data = (root / "etc/ld.so.cache").read_bytes()
    assert data[:20] == b"glibc-ld.so.cache1.1"
    count, strings = struct.unpack_from("<II", data, 20)
    assert len(data) == 48 + 24 * count + strings
    assert data[28] == 2, "little endian"
    found = []
    for number in range(count):
        flags, key, value = struct.unpack_from("<iII", data, 48 + 24 * number)
        assert flags == 0x0A03
        found.append(tuple(data[start : data.index(b"\0", start)].decode() for start in (key, value)))
    return [(name, path) for name, path in found]


def test_names_and_paths(tmp_path: Path) -> None:
    folder = tmp_path / LIBRARIES
    folder.mkdir(parents=True)
    (folder / "libz.so.1.3.1").write_bytes(ELF)
    (folder / "libz.so.1").symlink_to("libz.so.1.3.1")
    (folder / "libc.so.6").write_bytes(ELF)
    (folder / "libabsolute.so.2").symlink_to(f"/{LIBRARIES}/libc.so.6")
    (folder / "libforeign.so.1").write_bytes(ELF[:18] + struct.pack("<H", 62))
    (folder / "libc.so").write_text("/* GNU ld script */")
    (folder / "libgone.so.1").symlink_to("libgone.so.1.2")
    (folder / "notalib.so").write_bytes(ELF)
    second = tmp_path / "usr/lib"
    (second / "libc.so.6").write_bytes(ELF)
    ldcache.write(tmp_path, [LIBRARIES, "usr/lib", "usr/local/lib"])
    assert entries(tmp_path) == [
        ("libz.so.1", f"/{LIBRARIES}/libz.so.1"),
        ("libc.so.6", f"/{LIBRARIES}/libc.so.6"),
        ("libabsolute.so.2", f"/{LIBRARIES}/libabsolute.so.2"),
    ]


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("libx.so.9", "libx.so.10"),  # numbers by value
        ("libx.so.1", "libx.so.1.1"),
        ("liba.so", "libb.so"),
        ("libx-b.so", "libx1.so"),  # a digit is above any other character
        ("libx.so", "libxa.so"),
    ],
)
def test_the_loaders_order(lower: str, higher: str) -> None:
    assert ldcache._compare(lower, higher) < 0 < ldcache._compare(higher, lower)
    assert ldcache._compare(lower, lower) == 0


def test_the_order_is_the_one_of_the_hosts_ldconfig() -> None:
    """``ldconfig -p`` prints a cache in its order: the host's must be sorted as we would sort it."""
    tool = shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if not tool:
        pytest.skip("lacks: ldconfig (Debian: libc-bin)")
    printed = subprocess.run([tool, "-p"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in printed.splitlines()[1:] if "=>" in line]
    assert len(names) > 10
    shuffled = names.copy()
    random.Random(0).shuffle(shuffled)
    ours = sorted(shuffled, key=functools.cmp_to_key(ldcache._compare), reverse=True)
    assert ours == names
