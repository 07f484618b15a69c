"""Kernels of our own: from one source and one set of fragments, different in nothing but the page size;
cached."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from uspace_mm.errors import InputError, UnsupportedError, UspaceError
from uspace_mm.guest import cache
from uspace_mm.guest.kernel import options
from uspace_mm.guest.kernel.contents import contents
from uspace_mm.guest.kernel.header import read_header, read_version
from uspace_mm.guest.kernel.make import Make
from uspace_mm.guest.kernel.model import Kernel
from uspace_mm.guest.kernel.source import Source, available, resolve, unpack
from uspace_mm.guest.kernel.toolchain import Toolchain, check_tools, find_toolchain
from uspace_mm.guest.pagesize import PageSize, parse_page_size
from uspace_mm.guest.progress import Progress, silent

KIND = "kernel"
# Raised when how a kernel is built changes without its fragments, so that older entries are not taken for
# new ones.
RECIPE = 1
# Steps that make prints for Linux 6.12 with these fragments; for the progress only.
_STEPS = 1600


@dataclass(frozen=True)
class Built:
    """A cached kernel and how it came to be. ``built_s`` is the time that make took; ``missing`` the optional
    options it lacks, with the reason."""

    kernel: Kernel
    entry: Path
    source: str
    compiler: str
    built_s: float
    steps: int
    missing: dict[str, str]
    current: bool

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "page_size": str(self.kernel.page_size),
            "version": self.kernel.version,
            "image": str(self.kernel.image),
            "vmlinux": str(self.kernel.vmlinux),
            "config": str(self.kernel.config),
            "source": self.source,
            "compiler": self.compiler,
            "built_s": self.built_s,
            "missing": self.missing,
            "current": self.current,
        }


def build(
    page_sizes: Sequence[PageSize],
    *,
    source: str | Path | None = None,
    sha256: str | None = None,
    update: bool = False,
    jobs: int | None = None,
    progress: Progress = silent,
) -> list[Built]:
    """The kernels for `page_sizes`, from the cache or built now; their source is unpacked once.

    `source`, `sha256` and `update` are those of :func:`uspace_mm.guest.kernel.source.resolve`. Raises
    :class:`UnsupportedError` naming the tools that are missing, :class:`InputError` for a source that is
    none or that lacks an option, :class:`CacheError` without space, :class:`BuildError` when make fails.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs {jobs}: at least one is needed")
    toolchain = find_toolchain()
    found = resolve(source, sha256=sha256, update=update, progress=progress)
    wanted = options.wishes()
    if any(cache.find(KIND, _inputs(size, found, toolchain, wanted)) is None for size in page_sizes):
        check_tools(toolchain)
        found = available(found, progress)
    with ExitStack() as stack:
        workshop = _Workshop(found, toolchain, jobs or len(os.sched_getaffinity(0)), wanted, stack)
        entries = []
        for number, size in enumerate(page_sizes, 1):
            which = f"kernel {size}" + (f" ({number} of {len(page_sizes)})" if len(page_sizes) > 1 else "")

            def make(entry: Path, size: PageSize = size, which: str = which) -> None:
                workshop.make(size, entry, which, progress)

            inputs = _inputs(size, found, toolchain, wanted)
            entries.append(cache.obtain(KIND, inputs, make, progress=progress))
        return [_read(entry, wanted) for entry in entries]


def find(
    page_size: PageSize,
    *,
    build: bool = True,
    source: str | Path | None = None,
    progress: Progress = silent,
) -> Kernel:
    """Our own kernel with `page_size`: the newest cached one with today's fragments, else built now.

    With `source` it is the one from that source. Without `build` raises :class:`UnsupportedError` when
    there is none; otherwise raises what :func:`build` raises.
    """
    if source is None:
        fitting = [item for item in cached() if item.current and item.kernel.page_size == page_size]
        if fitting:
            return fitting[-1].kernel
    if not build:
        raise UnsupportedError(
            f"no kernel with {page_size} pages is built: "
            f"run uspace-mm guest kernel build --page-size {page_size}"
        )
    return _build_one(page_size, source, progress)


def cached() -> list[Built]:
    """Every whole kernel of ours in the cache, the oldest first."""
    wanted = options.wishes()
    found = []
    for manifest in (cache.cache_root() / KIND).glob(f"*/{cache.MANIFEST}"):
        if manifest.parent.name.startswith("."):
            continue
        try:
            inputs = json.loads(manifest.read_text())["inputs"]
            if cache.find(KIND, inputs) == manifest.parent:
                found.append((manifest.stat().st_mtime_ns, _read(manifest.parent, wanted)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or removed meanwhile
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def _build_one(page_size: PageSize, source: str | Path | None, progress: Progress) -> Kernel:
    return build([page_size], source=source, progress=progress)[0].kernel


def _options_digest(wanted: Sequence[options.Wish]) -> str:
    return cache.digest_of({"wanted": sorted((wish.name, wish.value) for wish in wanted)})


def _inputs(
    size: PageSize, source: Source, toolchain: Toolchain, wanted: Sequence[options.Wish]
) -> dict[str, object]:
    return {
        "recipe": RECIPE,
        "page_size": size.name,
        "options": _options_digest(wanted),
        "source": source.digest,
        "compiler": toolchain.compiler,
    }


class _Workshop:
    """One source for several kernels, unpacked when the first of them is really built."""

    def __init__(
        self,
        source: Source,
        toolchain: Toolchain,
        jobs: int,
        wanted: Sequence[options.Wish],
        stack: ExitStack,
    ) -> None:
        self._source = source
        self._toolchain = toolchain
        self._jobs = jobs
        self._wanted = wanted
        self._stack = stack
        self._unpacked: Path | None = None

    def make(self, size: PageSize, entry: Path, which: str, progress: Progress) -> None:
        tree = self._tree(progress)
        folder = entry / "build"
        folder.mkdir()
        started = time.monotonic()
        make = Make(tree, folder, self._toolchain, self._jobs)
        progress(f"{which}: configuring", 0.0)
        options.write_wishes(size, self._wanted, folder / "wishes")
        make.run(
            "allnoconfig",
            step=lambda text: progress(f"{which}: configuring: {text}", 0.0),
            KCONFIG_ALLCONFIG=str(folder / "wishes"),
        )
        got = options.parse_config((folder / ".config").read_text())
        missing = options.check(self._wanted, size, got, tree)
        done = 0

        def step(text: str) -> None:
            nonlocal done
            done += 1
            progress(f"{which}: {text}", min(0.99, done / _STEPS))

        steps = make.run("Image", step=step)
        for made, name in (("arch/arm64/boot/Image", "Image"), ("vmlinux", "vmlinux"), (".config", "config")):
            (folder / made).rename(entry / name)
        with contents(entry / "Image") as image:
            header = read_header(image.data, "the image just built")
            version, _ = read_version(image.data, "the image just built")
        if header.page_size != size:
            raise UspaceError(
                f"the image just built has pages of {header.page_size}, not {size}: report this"
            )
        record = {
            "page_size": size.name,
            "version": version,
            "source": self._source.name,
            "compiler": self._toolchain.compiler,
            "options": _options_digest(self._wanted),
            "built_s": round(time.monotonic() - started, 1),
            "steps": steps,
            "missing": {item.wish.name: f"{item.why}; {item.wish.optional}" for item in missing},
        }
        (entry / "kernel.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder)

    def _tree(self, progress: Progress) -> Path:
        if self._unpacked is None:
            if self._source.kind == "folder" and self._source.path is not None:
                self._unpacked = self._source.path
            else:
                folder = self._stack.enter_context(_scratch(progress))
                self._unpacked = unpack(self._source, folder, progress)
        return self._unpacked


@contextmanager
def _scratch(progress: Progress) -> Iterator[Path]:
    """A temporary folder in the cache's file system; those that a killed process left are removed."""
    parent = cache.cache_root() / KIND
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".source-*"):
        with _lock(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".source-", dir=parent))
    try:
        with _lock(folder):
            yield folder
    finally:
        progress("removing the unpacked source")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process; False when another has it, or the folder is
    gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _read(entry: Path, wanted: Sequence[options.Wish]) -> Built:
    record = json.loads((entry / "kernel.json").read_text())
    kernel = Kernel(
        entry / "Image",
        parse_page_size(record["page_size"]),
        record["version"],
        "built",
        vmlinux=entry / "vmlinux",
        config=entry / "config",
    )
    return Built(
        kernel,
        entry,
        record["source"],
        record["compiler"],
        record["built_s"],
        record["steps"],
        record["missing"],
        record["options"] == _options_digest(wanted),
    )
