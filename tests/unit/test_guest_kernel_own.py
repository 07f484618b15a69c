"""Building and caching, with a tree whose Makefile only pretends: all but the compiling is real."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.kernel_images import image
from uspace_mm.cli import main
from uspace_mm.errors import InputError, UnsupportedError, UspaceError
from uspace_mm.guest.cache import CacheError
from uspace_mm.guest.kernel import build, cached, find
from uspace_mm.guest.kernel.make import BuildError
from uspace_mm.guest.pagesize import PAGE_SIZES, PageSize, parse_page_size

K16 = parse_page_size("16k")
MAKEFILE = """\
VERSION = 6
PATCHLEVEL = 12
SIZE = $(shell sed -n 's/^CONFIG_ARM64_\\(.*\\)K_PAGES=y/\\1k/p' $(O)/.config)
allnoconfig:
	@echo "$@ $(ARCH) $(CROSS_COMPILE) $(KCFLAGS) $(HOSTCFLAGS)" >> {log}
	@grep -v SOFT_DIRTY $(KCONFIG_ALLCONFIG) > $(O)/.config
Image:
	@echo "$@ $(SIZE)" >> {log}
	@echo '  CC      mm/memory.o'
	@mkdir -p $(O)/arch/arm64/boot
	@echo '  LD [M]  skipped'
{recipe}
	@cp images/$(SIZE) $(O)/arch/arm64/boot/Image
	@cp images/$(SIZE) $(O)/vmlinux
"""


class Fake:
    """A source tree, a compiler and tools that pretend; ``log`` has a line per run of make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.tree = folder / "linux"
        for part in ("arch/arm64/Kconfig", "Kconfig", "scripts/Makefile.build", "mm/Kconfig"):
            (self.tree / part).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / part).write_text('config MEM_SOFT_DIRTY\n\tbool "x"\n\tdepends on NEVER\n')
        (self.tree / "images").mkdir()
        for size in PAGE_SIZES:
            (self.tree / "images" / size.name).write_bytes(image(size.header_code))
        self.recipe("")
        tools = folder / "bin"
        tools.mkdir()
        for name in ("flex", "bison", "bc", "perl", "gcc", "ar", "ld", "nm", "objcopy"):
            for prefix in ("", "pretend-"):
                self._script(tools / (prefix + name), "exit 1")
        self.compiler = tools / "pretend-gcc"
        self.version("1.0")

    def version(self, version: str) -> None:
        self._script(
            self.compiler, f'[ "$1" = -dumpmachine ] && echo aarch64-linux-gnu || echo "gcc {version}"'
        )

    def recipe(self, line: str) -> None:
        (self.tree / "Makefile").write_text(MAKEFILE.format(log=self.log, recipe=f"\t@{line or 'true'}"))

    def tarball(self, name: str = "linux.tar") -> Path:
        path = self.folder / name
        with tarfile.open(path, "w") as archive:
            archive.add(self.tree, "linux-6.12")
        return path

    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    if not shutil.which("make"):
        pytest.skip("lacks: make (Debian: make)")
    fake = Fake(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CROSS_COMPILE", "pretend-")
    monkeypatch.setenv("UMM_GUEST_CACHE", str(tmp_path / "cache"))
    return fake


def left_in_cache(fake: Fake) -> list[str]:
    """What is neither an entry nor a lock."""
    folder = fake.folder / "cache" / "kernel"
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]


class Said:
    """Progress that is kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float | None]] = []

    def __call__(self, text: str, done: float | None = None) -> None:
        self.lines.append((text, done))


def test_all_sizes_come_from_one_unpacked_source(fake: Fake) -> None:
    said = Said()
    built = build(PAGE_SIZES, source=fake.tarball(), progress=said)
    assert [item.kernel.page_size for item in built] == list(PAGE_SIZES)
    for item in built:
        kernel = item.kernel
        assert (kernel.version, kernel.origin) == ("6.12.107", "built")
        assert kernel.vmlinux and kernel.config and kernel.image.read_bytes() == kernel.vmlinux.read_bytes()
        assert f"CONFIG_{kernel.page_size and kernel.page_size.config}=y" in kernel.config.read_text()
        assert list(item.missing) == ["MEM_SOFT_DIRTY"]
        assert "depends on NEVER" in item.missing["MEM_SOFT_DIRTY"]
        assert not (item.entry / "build").exists()
    assert len([text for text, done in said.lines if text.startswith("unpacking") and done == 0]) == 1
    assert "kernel 16k (2 of 3): CC mm/memory.o" in [text for text, _ in said.lines]
    assert fake.runs()[1::2] == ["Image 4k", "Image 16k", "Image 64k"]
    assert left_in_cache(fake) == []


def test_a_second_call_makes_and_reads_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = fake.tarball()
    first = build([K16], source=tarball)
    runs = fake.runs()
    said = Said()
    monkeypatch.setattr("uspace_mm.guest.cache.digest_file", lambda path: pytest.fail(f"read {path}"))
    assert build([K16], source=tarball, progress=said) == first
    assert (fake.runs(), said.lines) == (runs, [])


@pytest.mark.parametrize("change", ["source", "compiler", "fragments"])
def test_what_it_was_made_from_decides(
    fake: Fake, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = fake.tree
    first = build([K16], source=tree)[0]
    assert build([K16], source=tree)[0].entry == first.entry
    if change == "source":
        (tree / "mm" / "memory.c").write_text("new")
    elif change == "compiler":
        fake.version("2.0")
    else:
        from uspace_mm.guest.kernel import options

        own = tmp_path / "fragments"
        own.mkdir()
        (own / "a.config").write_text("CONFIG_A=y\n")
        wishes = options.wishes(own)
        monkeypatch.setattr(options, "wishes", lambda: wishes)
    second = build([K16], source=tree)[0]
    assert second.entry != first.entry
    assert len(fake.runs()) == 4
    # Today's fragments decide what is found without a source; the compiler does not.
    assert find(K16).image == second.kernel.image
    assert [item.current for item in cached()] == [change != "fragments", True]


def test_a_cached_kernel_is_found_without_a_compiler(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = build([K16], source=fake.tree)[0].kernel
    monkeypatch.setenv("PATH", str(fake.folder))
    assert find(K16) == kernel
    with pytest.raises(UnsupportedError, match="guest kernel build --page-size 4k"):
        find(PAGE_SIZES[0], build=False)
    with pytest.raises(UnsupportedError, match="pretend-gcc.*apt install gcc-pretend"):
        find(PAGE_SIZES[0], source=fake.tree)


def test_a_copied_cache_serves_elsewhere(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container image that takes its kernels from the build context."""
    kernel = build([K16], source=fake.tree)[0].kernel
    shutil.copytree(fake.folder / "cache", fake.folder / "other")
    shutil.rmtree(fake.folder / "cache")
    monkeypatch.setenv("UMM_GUEST_CACHE", str(fake.folder / "other"))
    found = find(K16, build=False)
    assert found.image != kernel.image and found.image.read_bytes() == image(2)
    found.image.write_bytes(image(1))
    with pytest.raises(UnsupportedError, match="no kernel with 16k pages"):
        find(K16, build=False)


def test_a_damaged_entry_is_made_again(fake: Fake) -> None:
    kernel = build([K16], source=fake.tree)[0].kernel
    kernel.image.write_bytes(image(1))
    assert cached() == []
    assert build([K16], source=fake.tree)[0].kernel.image.read_bytes() == image(2)
    assert len(fake.runs()) == 4


def test_the_callers_environment_does_not_change_the_kernel(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ARCH", "KCFLAGS", "HOSTCFLAGS", "MAKEFLAGS", "KBUILD_OUTPUT", "O"):
        monkeypatch.setenv(name, "--from-outside")
    build([K16], source=fake.tree)
    assert [line.split() for line in fake.runs()] == [["allnoconfig", "arm64", "pretend-"], ["Image", "16k"]]


@pytest.mark.parametrize(
    ("recipe", "error", "expected"),
    [
        (
            "echo 'mm/slab.c:7:1: error: no such thing' >&2; exit 1",
            BuildError,
            "mm/slab.c:7:1: error: no such",
        ),
        ("exit 3", BuildError, r"make Image failed .*Error 3"),
        (
            "echo 'cc1: fatal: No space left on device'; exit 1",
            CacheError,
            "free some, or set UMM_GUEST_CACHE",
        ),
        ("cp images/4k images/16k", UspaceError, "has pages of 4k, not 16k"),
        ("echo damaged > images/16k", InputError, "too short"),
    ],
    ids=["error", "silent", "no space", "other size", "damaged"],
)
def test_failures_are_one_line_and_leave_nothing(
    fake: Fake, recipe: str, error: type[UspaceError], expected: str
) -> None:
    fake.recipe(recipe)
    with pytest.raises(error, match=expected) as caught:
        build([K16], source=fake.tarball())
    assert "\n" not in str(caught.value)
    assert left_in_cache(fake) == [] and cached() == []


def test_an_interrupted_build_ends_the_compilers_and_leaves_nothing(fake: Fake) -> None:
    pids = fake.folder / "pids"
    # The second one ignores the first signal, as a compiler in a bad state would.
    fake.recipe(f"sleep 600 & echo $$! > {pids}; echo '  CC      mm/slow.o'; wait")

    def interrupt(text: str, done: float | None = None) -> None:
        if "mm/slow.o" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build([K16], source=fake.tarball(), progress=interrupt)
    assert left_in_cache(fake) == []
    pid = int(pids.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)


def test_what_a_killed_build_left_is_removed(fake: Fake) -> None:
    import fcntl

    folder = fake.folder / "cache" / "kernel"
    for name in (".source-dead", ".source-alive"):
        (folder / name / "tree").mkdir(parents=True)
    descriptor = os.open(folder / ".source-alive", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        build([K16], source=fake.tarball())
    finally:
        os.close(descriptor)
    assert left_in_cache(fake) == [".source-alive"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_is_checked(fake: Fake) -> None:
    tarball = fake.tarball()
    assert build([K16], source=tarball, sha256=sha256(tarball).upper() + "\n")
    with pytest.raises(InputError, match=f"its SHA-256 is {sha256(tarball)}, not the 00"):
        build([K16], source=tarball, sha256="00")
    with pytest.raises(InputError, match="a folder has no SHA-256"):
        build([K16], source=fake.tree, sha256="00")


def no_kernel(fake: Fake) -> Path:
    path = fake.folder / "other.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("other/README"), io.BytesIO(b""))
    return path


def built_in(fake: Fake) -> Path:
    (fake.tree / ".config").touch()
    return fake.tree


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (no_kernel, "not the source of a Linux kernel"),
        (built_in, "make mrproper"),
        (lambda fake: fake.folder / "bin", "not the source of a Linux kernel"),
        (lambda fake: fake.compiler, "not a whole tarball"),
        (lambda fake: fake.folder / "none", "neither a file or folder nor a package"),
        (lambda fake: Path("/dev/null"), "neither a file or folder nor a package"),
        (lambda fake: Path("x" * 5000), "cannot be read: File name too long"),
    ],
    ids=["no kernel", "built in", "other folder", "no tarball", "missing", "device", "long"],
)
def test_bad_sources_are_named(fake: Fake, make: Callable[[Fake], Path], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        build([K16], source=make(fake))
    assert "\n" not in str(caught.value) and fake.runs() == []


def test_missing_tools_are_named_together(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flex", "bison", "pretend-ld"):
        (fake.folder / "bin" / name).unlink()
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}")
    with pytest.raises(UnsupportedError) as caught:
        build([K16], source=fake.tree)
    text = "lacks: make, flex, bison, pretend-ld: apt install make flex bison binutils-pretend"
    assert str(caught.value) == text


def test_a_compiler_for_something_else_is_refused(fake: Fake) -> None:
    fake.compiler.write_text("#!/bin/sh\necho x86_64-linux-gnu\n")
    with pytest.raises(UnsupportedError, match="compiles for x86_64-linux-gnu, not for aarch64"):
        build([K16], source=fake.tree)


def test_an_arm64_machine_compiles_with_its_own(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSS_COMPILE")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    shutil.copy(fake.compiler, fake.folder / "bin" / "gcc")
    assert build([K16], source=fake.tree)[0].compiler == "gcc 1.0"
    assert fake.runs()[0].split() == ["allnoconfig", "arm64"]


def test_a_missing_option_names_the_fragment_s_wish(fake: Fake) -> None:
    makefile = fake.tree / "Makefile"
    makefile.write_text(makefile.read_text().replace("-v SOFT_DIRTY", "-v 'SOFT_DIRTY\\|USERFAULTFD'"))
    with pytest.raises(InputError, match="USERFAULTFD is n, not y .this source has no such option"):
        build([K16], source=fake.tree)
    assert cached() == []


def test_the_cache_may_be_read_only(fake: Fake) -> None:
    if os.geteuid() == 0:
        blocked = fake.folder / "cache"
        blocked.write_text("a file where the folder should be")
    else:
        (fake.folder / "cache").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(CacheError, match="UMM_GUEST_CACHE"):
        build([K16], source=fake.tarball())


def test_the_commands(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, status: int = 0) -> str:
        assert main(["guest", "kernel", *arguments]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    assert said("list").startswith("no kernel in ")
    arguments = ("build", "--page-size", "16k,4k", "--source", str(fake.tree))
    text = said(*arguments)
    assert text.count("Linux 6.12.107") == 2 and "without MEM_SOFT_DIRTY: it depends on NEVER" in text
    kernels = json.loads(said(*arguments, "--json"))["kernels"]
    assert [kernel["page_size"] for kernel in kernels] == ["16k", "4k"]
    found = json.loads(said("inspect", "--json", kernels[0]["image"]))["kernels"][0]
    assert (found["page_size"], found["version"], found["sections"]) == ("16k", "6.12.107", None)
    assert "16k (from header)" in said("inspect", kernels[0]["image"])
    assert said("list").count("built") == 2
    assert len(json.loads(said("list", "--json"))["built"]) == 2
    table = said("compare", kernels[1]["image"], kernels[0]["image"])
    assert "55161 (+266, +0.5 %)" in table and "not known" in table
    both = json.loads(said("compare", "--json", kernels[1]["image"], kernels[0]["image"]))
    assert both["kernels"][1]["difference"]["image"]["kb"] == 0
    assert "from two to eight" in said("compare", "x", status=2)
    assert "ships no arm64 kernel with 64k" in said("fetch", "--page-size", "64k", status=2)
    assert "5k" in said("build", "--page-size", "5k", status=2)
    assert "at least one" in said(*arguments, "--jobs", "0", status=2)


def test_sizes_given_twice_are_built_once(fake: Fake) -> None:
    sizes: list[PageSize] = [K16, K16]
    first, second = build(sizes, source=fake.tree)
    assert first.entry == second.entry
    assert fake.runs()[1::2] == ["Image 16k"]
