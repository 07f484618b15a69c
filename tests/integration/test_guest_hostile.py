"""Guests on machines that lack space, network or rights, with a cache that was damaged, and interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from uspace_mm.guest import cache, kernel, rootfs

UMM = [sys.executable, "-c", "import sys; from uspace_mm.cli import main; sys.exit(main())"]
SEED = 3
# A deadline for what should take seconds, on a machine that does other things as well.
LIMIT_S = 100


def umm(*arguments: str, before: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *UMM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **env},
    )


def said(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Status and the one line on stderr; nothing else may have been said."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def made() -> str:
    """The page size of a kernel of ours that is cached, with the root image that goes with it."""
    for tool, package in (("qemu-system-aarch64", "qemu-system-arm"), ("mksquashfs", "squashfs-tools")):
        if not shutil.which(tool):
            pytest.skip(f"lacks: {tool} (Debian: {package})")
    fitting = [built for built in kernel.cached() if built.current]
    if not fitting:
        pytest.skip("lacks: a kernel for guests (uspace-mm guest kernel build --page-size 64k)")
    rootfs.obtain()
    return str(fitting[-1].kernel.page_size)


@pytest.fixture
def own_cache(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, with copies of what a guest boots and of what a root is made of."""
    folder = tmp_path / "cache"
    root = rootfs.obtain()
    wanted = [next(b.entry for b in kernel.cached() if b.current and str(b.kernel.page_size) == made)]
    wanted += [path.parent for path in (*root.layers, root.agent)]
    old = cache.cache_root()
    for entry in wanted:
        shutil.copytree(entry, folder / entry.relative_to(old))
    for kind in ("extension", "host-python", "resolved", "sysroot"):
        shutil.copytree(old / kind, folder / kind, dirs_exist_ok=True)
    monkeypatch.setenv("UMM_GUEST_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


@contextmanager
def mounted(path: Path, *command: str) -> Iterator[Path]:
    """`path` with something mounted on it, which is gone again afterwards."""
    path.mkdir()
    done = subprocess.run(["mount", *command, str(path)], capture_output=True, text=True)
    if done.returncode:
        path.rmdir()
        pytest.skip("lacks: the right to mount (CAP_SYS_ADMIN)")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
        path.rmdir()


def half_made(folder: Path) -> list[Path]:
    """What a command that was stopped should have removed."""
    return [
        path for path in folder.rglob(".*") if path.name.endswith(".new") or path.name.startswith(".source")
    ]


@pytest.mark.parametrize(
    "command",
    ["root build", "kernel build --page-size 16k", "kernel fetch --page-size 16k"],
)
def test_without_network_and_cache_the_network_is_named(tmp_path: Path, command: str) -> None:
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("lacks: the right to unshare the network (CAP_SYS_ADMIN)")
    folder = tmp_path / "cache"
    done = umm("guest", *command.split(), before=("unshare", "-n"), UMM_GUEST_CACHE=str(folder))
    status, line = said(done)
    assert (status, "network" in line) == (3, True), line
    assert half_made(folder) == []


def test_what_cannot_be_a_kernel_is_said_at_once(tmp_path: Path) -> None:
    sparse, pipe = tmp_path / "sparse", tmp_path / "pipe"
    sparse.touch()
    os.truncate(sparse, 1 << 40)
    os.mkfifo(pipe)
    for path in (sparse, pipe, Path("/dev/zero"), tmp_path):
        status, line = said(umm("guest", "kernel", "inspect", str(path)))
        assert status == 2
        assert f"{path}: " in line


def test_a_full_disk_is_named_whoever_meets_it_first(tmp_path: Path, made: str) -> None:
    with mounted(tmp_path / "tiny", "-t", "tmpfs", "-o", "size=256k", "none") as tiny:
        status, line = said(umm("guest", "root", "build", UMM_GUEST_CACHE=str(tiny)))
        assert (status, "no space left in" in line, "UMM_GUEST_CACHE" in line) == (3, True, True), line
        assert half_made(tiny) == []


def test_a_disk_that_gets_full_while_a_layer_is_packed_is_named(own_cache: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "noise").write_bytes(os.urandom(4 << 20))
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=6M", "none") as small:
        # Room for the copy of the file, not for the image.
        (own_cache / "root-overlay").symlink_to(small)
        status, line = said(umm("guest", "root", "build", "--overlay", str(overlay)))
        assert (status, "no space left in" in line) == (3, True), line
        assert half_made(small) == []


@pytest.mark.slow
def test_a_guest_boots_from_a_cache_that_may_only_be_read(own_cache: Path, tmp_path: Path, made: str) -> None:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "file").write_text("new")
    with mounted(tmp_path / "read-only", "--bind", str(own_cache)) as folder:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        done = umm("guest", "run", "--page-size", made, "--", "echo", "up", UMM_GUEST_CACHE=str(folder))
        assert (done.returncode, done.stdout, done.stderr) == (0, "up\n", "")
        command = ["root", "build", "--overlay", str(tmp_path / "overlay")]
        status, line = said(umm("guest", *command, UMM_GUEST_CACHE=str(folder)))
        assert status == 3
        assert "cannot write to" in line
        assert "UMM_GUEST_CACHE" in line


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data), 1000):
        data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.slow
def test_damaged_layers_are_made_again_and_a_damaged_kernel_is_none(own_cache: Path, made: str) -> None:
    root = rootfs.obtain()
    good = {path: path.read_bytes() for path in (root.layers[-1], root.agent)}
    for path in good:
        flip(path)
    done = umm("guest", "run", "--page-size", made, "--", "python3", "-c", "import uspace_mm.kernel")
    assert (done.returncode, done.stderr) == (0, "")
    for path, content in good.items():
        assert path.read_bytes() == content
    (image,) = (own_cache / "kernel").glob("*/Image")
    flip(image)
    done = umm("guest", "kernel", "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(image) not in done.stdout


def test_two_builds_of_the_same_root_at_once_agree(own_cache: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "noise").write_bytes(os.urandom(1 << 20))
    command = [*UMM, "guest", "root", "build", "--overlay", str(overlay), "--json"]
    both = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=LIMIT_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert json.loads(answers[0]) == json.loads(answers[1])
    assert len(list((own_cache / "root-overlay").glob("[!.]*"))) == 1
    assert half_made(own_cache) == []


def processes_with(variable: str) -> list[str]:
    """Command lines of the processes that have `variable` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def interrupt(command: list[str], delay_s: float, to_group: bool, tmp: Path) -> tuple[int, str]:
    """Run it, send it SIGINT after `delay_s` from its first sign of life; nothing of it may be left then."""
    tmp.mkdir()
    mark = f"UMM_TEST_MARK={tmp}"
    process = subprocess.Popen(
        [sys.executable, "-c", UMM[2].replace("sys.exit", "print('up', flush=True); sys.exit"), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp), "UMM_TEST_MARK": str(tmp)},
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    time.sleep(delay_s)
    if process.poll() is None:
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    deadline = time.monotonic() + 5
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert list(tmp.iterdir()) == []
    tmp.rmdir()
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "overlay", "extension"])
def test_ctrl_c_at_any_moment_leaves_nothing(own_cache: Path, tmp_path: Path, made: str, what: str) -> None:
    delays = random.Random(SEED)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    commands = {
        "run": (["guest", "run", "--page-size", made, "--", "sleep", "60"], 4.0),
        "overlay": (["guest", "root", "build", "--overlay", str(overlay)], 1.0),
        "extension": (["guest", "root", "build"], 5.0),
    }
    command, longest_s = commands[what]
    for number in range(6):
        (overlay / "noise").write_bytes(os.urandom(4 << 20))
        if what == "extension":
            for kind in ("extension", "root-own", "agent"):
                shutil.rmtree(own_cache / kind, ignore_errors=True)
        delay_s = delays.uniform(0, longest_s)
        status, err = interrupt(command, delay_s, number % 2 == 1, tmp_path / f"tmp{number}")
        if what == "run" or err:
            assert (status, err) == (130, "uspace-mm guest: interrupted\n"), delay_s
        else:  # it had ended before, or was about to: the interpreter then dies of the signal
            assert status in (0, -signal.SIGINT), delay_s
        assert half_made(own_cache) == []
