"""The rules against three kernels: files of every kind are loaded, and what happens is what was predicted."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.elf_kinds import LAYOUTS, PREFIX, build
from uspace_mm.elf.audit import audit
from uspace_mm.elf.image import read_image
from uspace_mm.elf.prove import prove, tools
from uspace_mm.elf.prove.observation import Observation, parse
from uspace_mm.elf.records import Loader, Report, Status
from uspace_mm.elf.source import BytesSource
from uspace_mm.elf.verdict import judge
from uspace_mm.guest.boot import Guest, Machine, boot
from uspace_mm.guest.boot.ready import find_kernel
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize
from uspace_mm.guest.progress import Progress, silent
from uspace_mm.guest.rootfs import RootFilesystem, obtain

LIBCS = {
    Loader.GLIBC: ("glibc", "libc.so.6", "/lib/ld-linux-aarch64.so.1"),
    Loader.MUSL: ("musl", "libc.so", "/lib/ld-musl-aarch64.so.1"),
}
FOLDER = "/kinds"
JEMALLOC = b"<jemalloc>: Unsupported system page size\n"


@pytest.fixture(scope="module")
def tested() -> None:
    for program, package in (("gcc", "gcc"), ("ld", "binutils")):
        if shutil.which(PREFIX + program) is None:
            pytest.skip(f"lacks: {PREFIX}{program} (Debian: {package}-{PREFIX[:-1]})")
    if shutil.which("qemu-system-aarch64") is None:
        pytest.skip("lacks: qemu-system-aarch64 (Debian: qemu-system-arm)")


class Guests:
    """One guest per page size for all tests of this file: booted when first asked for."""

    def __init__(self) -> None:
        self._root: RootFilesystem | None = None
        self._guests: dict[PageSize, Guest] = {}
        self._stack = ExitStack()

    def of(self, size: PageSize) -> Guest:
        if size not in self._guests:
            self._root = self._root or obtain(own=False)
            guest = boot(find_kernel(size), size, self._root, Machine())
            self._guests[size] = self._stack.enter_context(guest)
        return self._guests[size]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def kinds(tested: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Loader]]:
    """Every layout as a library (for both loaders) and as an executable of each libc, by a name for it."""
    folder = tmp_path_factory.mktemp("kinds")
    found: dict[str, tuple[Path, Loader]] = {}
    for layout in LAYOUTS:
        library = build(layout, folder)
        for loader, (libc, soname, interpreter) in LIBCS.items():
            found[f"{layout.name}, library, {libc}"] = (library, loader)
            inside = folder / libc
            inside.mkdir(exist_ok=True)
            program = build(layout, inside, interp=interpreter, soname=soname)
            found[f"{layout.name}, executable, {libc}"] = (program, Loader.KERNEL)
    return found


def job(name: str, path: Path, loader: Loader) -> tuple[str, str]:
    """The probe's line for a file, and where it lies in the guest."""
    place = f"{FOLDER}/{path.parent.name}/{path.name}"
    if loader is Loader.KERNEL:
        return "\t".join([name, "executable", "20000", place, place]), place
    opener = f"{tools.FOLDER}/{tools.OPENERS[LIBCS[loader][0]]}"
    return "\t".join([name, "library", "20000", place, opener, place]), place


def observe(guest: Guest, kinds: dict[str, tuple[Path, Loader]]) -> dict[str, Observation]:
    for name, program in tools.obtain().items():
        guest.put(f"{tools.FOLDER}/{name}", program, 0o755)
    lines = []
    for name, (path, loader) in kinds.items():
        line, place = job(name, path, loader)
        guest.put(place, path, 0o755)
        lines.append(line + "\n")
    guest.put(f"{tools.FOLDER}/jobs", "".join(lines).encode())
    out: list[bytes] = []
    guest.run(
        [f"{tools.FOLDER}/{tools.PROBE}", f"{tools.FOLDER}/jobs"],
        on_stdout=lambda data: out.append(bytes(data)),
        timeout_s=120,
    )
    return parse(b"".join(out).decode().splitlines())


def status_of(seen: Observation) -> Status:
    if not seen.compared:
        return Status.FAILS
    if seen.differences or (seen.end, seen.code) != ("exited", 0):
        return Status.WRONG
    return Status.LOADS


@pytest.mark.slow
def test_every_kind_behaves_as_predicted_with_every_page_size_and_libc(
    kinds: dict[str, tuple[Path, Loader]],
) -> None:
    guests = Guests()
    unlike: list[str] = []
    met: set[tuple[Loader, Status]] = set()
    try:
        for size in PAGE_SIZES:
            seen = observe(guests.of(size), kinds)
            assert seen.keys() == kinds.keys()
            for name, (path, loader) in kinds.items():
                image = read_image(BytesSource(path.read_bytes()))
                predicted = dict(judge(image, size).by_loader)[loader]
                observed = status_of(seen[name])
                assert seen[name].page == size.bytes
                # A file that is mapped wrong may die of it before it can be compared.
                if predicted is not observed and (predicted, observed) != (Status.WRONG, Status.FAILS):
                    unlike.append(
                        f"{size}, {name}: {predicted.value}, but {seen[name]}, {seen[name].differences}"
                    )
                met.add((loader, observed))
    finally:
        guests.close()
    assert not unlike, "\n".join(unlike)
    # The kinds are worth something only if each loader shows all three.
    for loader in (*LIBCS, Loader.KERNEL):
        assert {(loader, status) for status in (Status.LOADS, Status.WRONG, Status.FAILS)} <= met


@pytest.fixture
def proved(tested: None, tmp_path: Path) -> Iterator[Report]:
    """An audit with ``--prove`` of a folder: some good, some bad, some that cannot be loaded anywhere."""
    folder = tmp_path / "files"
    folder.mkdir()
    by_name = {layout.name: layout for layout in LAYOUTS}
    for name in ("good", "patchelf", "relro-start-inside", "align-4k"):
        build(by_name[name], folder)
    jemalloc = build(by_name["no-relro"], folder)
    data = jemalloc.read_bytes()
    # The message of jemalloc in a file that does not contain it: run, it turns out to be fine.
    assert data.count(b"r" * 100) >= 1
    jemalloc.write_bytes(data.replace(b"r" * len(JEMALLOC), JEMALLOC, 1))
    missing = build(by_name["linked-for-4k"], folder, interp="/lib/ld-none.so.1", soname="libnone.so")
    missing.rename(folder / "missing.exe")
    for path in folder.iterdir():
        if path.suffix not in (".so", ".exe"):
            path.unlink()
    with zipfile.ZipFile(folder / "x-1-py3-none-manylinux_2_28_aarch64.whl", "w") as wheel:
        wheel.write(jemalloc, "x/_x.abi3.so")
        wheel.writestr("x/__init__.py", "import os\nif os.sysconf('SC_PAGESIZE') > 4096: os.abort()\n")
    booted: list[PageSize] = []

    def booter(size: PageSize, machine: Machine, progress: Progress) -> Guest:
        booted.append(size)
        return boot(find_kernel(size), size, obtain(own=False), machine, progress=progress)

    sizes = (PAGE_SIZES[0], PAGE_SIZES[2])
    report = audit([folder], sizes)
    prove(report, progress=silent, booter=booter)
    assert booted == list(sizes)
    yield report


@pytest.mark.slow
def test_prove_puts_evidence_beside_the_verdicts(proved: Report) -> None:
    told = {Path(file.name).name: file.verdicts[1] for file in proved.files}
    assert told["good.so"].evidence is None
    assert told["good.so"].status is Status.LOADS
    patched = told["patchelf.so"]
    assert patched.status is Status.FAILS
    assert patched.evidence is not None
    assert "not page-aligned" in patched.evidence.text
    relro = told["relro-start-inside.so"]
    assert relro.status is Status.WRONG
    assert relro.evidence is not None
    assert relro.evidence.compared
    assert "wants RW, has R" in relro.evidence.text
    jemalloc = told["no-relro.so"]
    assert (jemalloc.predicted, jemalloc.status) == (Status.UNKNOWN, Status.LOADS), jemalloc
    assert jemalloc.evidence is not None
    assert jemalloc.evidence.compared
    assert told["align-4k.so"].status is Status.NEWER_GLIBC
    wheel = next(verdict for name, verdict in told.items() if name.endswith("_x.abi3.so"))
    assert (wheel.predicted, wheel.status) == (Status.UNKNOWN, Status.FAILS)
    assert wheel.evidence is not None
    assert "SIGABRT" in wheel.evidence.text
    missing = told["missing.exe"]
    assert missing.status is missing.predicted is Status.FAILS
    assert missing.evidence is not None
    assert "4k pages either" in missing.evidence.text
