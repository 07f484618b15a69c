"""The preloaded library: under programs that know nothing of us, and under this package."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uspace_mm.errors import InputError
from uspace_mm.notifier import Event, Kind, Promise, Reason, Source
from uspace_mm.notifier.preload import Command, is_there, path

PAGE = mmap.PAGESIZE
ROOT = Path(__file__).resolve().parents[2]


def events_of(*command: str) -> list[Event]:
    with Command(command, popen={"stdout": subprocess.DEVNULL}) as program:
        found = list(program)
        assert program.process.returncode == 0 and program.lost == 0 and program.processes > 0
        assert all(event.source is Source.PRELOAD for event in found)
    return found


def test_a_program_that_knows_nothing_of_us() -> None:
    script = f"import mmap; m = mmap.mmap(-1, 77 * {PAGE}); m[:] = bytes(77 * {PAGE}); m.close()"
    found = events_of(sys.executable, "-S", "-c", script)
    start, end = (event for event in found if event.length == 77 * PAGE and event.reason is Reason.UNMAP)
    assert (start.kind, end.kind, start.start, start.id) == (Kind.START, Kind.END, end.start, end.id)
    assert start.promise is Promise.ORDERED and start.pid == end.pid
    assert (found[-1].kind, found[-1].reason) == (Kind.RELEASE, Reason.EXIT)
    began = [event.id for event in found if event.kind is Kind.START]
    assert sorted(began) == sorted(event.id for event in found if event.kind is Kind.END)


def test_exec_and_fork_of_a_shell() -> None:
    # A child, a vfork'ed or forked program, and the shell replaced by another program.
    found = events_of("/bin/sh", "-c", "(exit 0); exec /bin/ls /")
    told = [(event.kind, event.reason) for event in found]
    assert (Kind.START, Reason.FORK) in told and (Kind.END, Reason.FORK) in told
    shell = found[0].pid
    own = [(event.kind, event.reason) for event in found if event.pid == shell]
    assert own.index((Kind.RELEASE, Reason.EXEC)) < own.index((Kind.RELEASE, Reason.EXIT))
    assert len({event.pid for event in found}) == 2


def test_a_program_never_waits_for_its_reader() -> None:
    script = f"import mmap\nfor i in range(200): mmap.mmap(-1, {PAGE}).close()"
    with Command([sys.executable, "-S", "-c", script], capacity=16) as program:
        assert program.process.wait(60) == 0
        found = list(program)
        assert len(found) == 16 and program.lost >= 400 - 16
    with pytest.raises(InputError, match="closed"):
        program.poll()


def test_a_command_that_runs_is_ended_by_close() -> None:
    with Command(["sleep", "1000"]) as program:
        assert program.poll() == []
        process = program.process
    assert process.returncode == -9


def test_bad_commands_end_in_one_line() -> None:
    for command, capacity in ((["/no/such/program"], 16), ([], 16), (["true"], 48), (["true"], 0)):
        with pytest.raises(InputError) as caught:
            Command(command, capacity=capacity)
        assert "\n" not in str(caught.value)
    assert not is_there()


SCRIPT = """
import ctypes, errno, mmap, os, queue, subprocess, sys, threading
from uspace_mm.errors import UspaceError
from uspace_mm.notifier import Kind, Notifier, Promise, Reason, Source, register
from uspace_mm.notifier.preload import is_there

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
number = ctypes.c_int
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
assert is_there()

def new(pages):
    at = libc.mmap(None, pages * PAGE, 3, 0x22, -1, 0)
    ctypes.memset(at, 0x42, pages * PAGE)
    return at

class Looks(Notifier):
    wait_s = 30
    def __init__(self):
        super().__init__()
        self.events = queue.Queue()
        self.also = None
    def invalidate_range_start(self, event):
        assert event.source is Source.PRELOAD
        # (what this callback unmaps itself it hears of when it is over)
        if event.start != other:
            assert event.promise is Promise.ORDERED
            assert ctypes.string_at(event.start, 1) == b"B", "gone before it was told"
        if self.also is not None:
            also, self.also = self.also, None
            assert libc.munmap(also, PAGE) == 0
        self.events.put(event)
    def invalidate_range_end(self, event):
        self.events.put(event)
    def release(self, event):
        self.events.put(event)
        if event.reason is Reason.EXIT:
            print("released before the end", flush=True)

looks = Looks()
at, other = new(4), new(1)
with register(looks, at, at + 4 * PAGE), register(looks, other, other + PAGE):
    assert libc.munmap(at + PAGE, PAGE) == 0
    start, end = looks.events.get(timeout=30), looks.events.get(timeout=30)
    assert (start.kind, end.kind, start.id) == (Kind.START, Kind.END, end.id)
    assert (start.start, start.end, start.ordered) == (at + PAGE, at + 2 * PAGE, True)
    # one that fails is balanced, and keeps its errno
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.madvise(at, 2 * PAGE, 4) == -1 and ctypes.get_errno() == errno.ENOMEM
    start, end = looks.events.get(timeout=30), looks.events.get(timeout=30)
    assert start.reason is Reason.REMOVE and end.error == errno.ENOMEM
    # a callback changes memory itself
    ctypes.memset(at, 0x42, PAGE)
    looks.also = other
    assert libc.munmap(at, PAGE) == 0
    told = {}
    while len(told) < 4:
        event = looks.events.get(timeout=30)
        told[event.start, event.kind] = event
    assert {start for start, kind in told} == {at, other}
    # a child of vfork has our memory, and goes
    subprocess.run(["true"], check=True)
    assert looks.events.empty()

# Python's own mmap holds the GIL over munmap: heard, but not waited for
class Hears(Notifier):
    wait_s = None
    def __init__(self):
        super().__init__()
        self.events = queue.Queue()
    def invalidate_range_start(self, event):
        self.events.put(event)
    def invalidate_range_end(self, event):
        self.events.put(event)
    def release(self, event):
        self.events.put(event)
hears = Hears()
memory = mmap.mmap(-1, 8 * PAGE)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with register(hears, at, at + 8 * PAGE):
    memory.close()
    start, end = hears.events.get(timeout=30), hears.events.get(timeout=30)
    assert (start.kind, end.kind, start.source) == (Kind.START, Kind.END, Source.PRELOAD)
    assert (start.start, start.end) == (at, at + 8 * PAGE)

# exec that fails: no such file tells nothing; one that cannot run releases, and one can register anew
registration = register(hears)
for name, reasons in (("/no/such", []), (sys.argv[1], [Reason.EXEC])):
    try:
        os.execv(name, [name])
    except OSError as error:
        pass
    for reason in reasons:
        while (event := hears.events.get(timeout=30)).reason is not reason:
            pass
        assert (event.kind, event.reason) == (Kind.RELEASE, reason), event
registration.close()
registration = register(hears)
if os.fork() == 0:
    os._exit(0)
assert os.wait()[1] == 0
while True:
    try:
        event = hears.events.get_nowait()
    except queue.Empty:
        break
    assert event.kind is not Kind.RELEASE
# os._exit would hold the GIL
last = register(Looks())
libc._exit(0)
"""


def test_this_package_under_the_library(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF but nothing more")
    broken.chmod(0o755)
    environment = dict(os.environ, LD_PRELOAD=str(path()))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(broken)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "released before the end\n"


SIGNALS = r"""
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/time.h>
#include <unistd.h>
static long page;
static volatile int handled;
static void handler(int number)
{
	(void)number;
	munmap(mmap(0, page, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), page);
	handled++;
}
int main(void)
{
	struct itimerval often = {{0, 200}, {0, 200}};
	page = sysconf(_SC_PAGESIZE);
	signal(SIGALRM, handler);
	setitimer(ITIMER_REAL, &often, 0);
	for (int i = 0; handled < 100 || i < 1000; i++)
		munmap(mmap(0, 2 * page, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 2 * page);
	often.it_value.tv_usec = 0;
	setitimer(ITIMER_REAL, &often, 0);
	int segment = shmget(IPC_PRIVATE, 5 * page + 1, 0600);
	char *shared = shmat(segment, 0, 0);
	mprotect(shared + page, page, PROT_READ);
	shmctl(segment, IPC_RMID, 0);
	if (shmdt(shared) || shmdt(shared) != -1)
		return 2;
	execlp("no-such-program-anywhere", "x", "y", (char *)0);
	execlp("true", "true", "unused", (char *)0);
	return 1;
}
"""


def test_signal_handlers_and_a_plain_c_program(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("lacks: a C compiler")
    source, program = tmp_path / "signals.c", tmp_path / "signals"
    source.write_text(SIGNALS)
    subprocess.run([compiler, "-o", str(program), str(source)], check=True)
    with Command([str(program)], capacity=1 << 20) as running:
        found = list(running)
        assert running.process.returncode == 0 and running.lost == 0
    pairs: dict[int, list[Event]] = {}
    for event in found:
        if event.reason is Reason.UNMAP:
            pairs.setdefault(event.id, []).append(event)
    assert all([event.kind for event in pair] == [Kind.START, Kind.END] for pair in pairs.values())
    lengths = [pair[0].length for pair in pairs.values()]
    assert lengths.count(PAGE) >= 100 and lengths.count(2 * PAGE) >= 1000
    # what a shmdt takes away, in one piece although a part had other permissions
    assert lengths.count(6 * PAGE) == 1
    told = [(event.kind, event.reason) for event in found]
    # once: for the program that there is
    assert told.count((Kind.RELEASE, Reason.EXEC)) == 1
