"""A guest that runs: booted, given commands in turn, and gone when it is closed."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO

from uspace_mm.errors import InputError
from uspace_mm.guest.boot.conversation import Conversation, Resized, Sink
from uspace_mm.guest.boot.errors import GuestError, GuestFileError
from uspace_mm.guest.boot.launch import Kernel, RootFilesystem, is_emulated, launch
from uspace_mm.guest.boot.machine import Deadlines, Hello, Machine
from uspace_mm.guest.boot.qemu import Qemu
from uspace_mm.guest.channel import ChannelError
from uspace_mm.guest.outcome import ChannelLost, Outcome, Silent, WrongPageSize
from uspace_mm.guest.pagesize import PageSize
from uspace_mm.guest.progress import Progress, silent

_CHUNK_BYTES = 1 << 18
ENTROPY_BYTES = 64
#: What a command finds in its environment, besides what the caller gives.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}


class Guest:
    """A running guest, made by :func:`boot`. Close it, or use it in a ``with`` statement.

    ``hello`` is what it said of itself. For one thread, but for :meth:`close` and :meth:`ping`.
    """

    def __init__(self, qemu: Qemu, conversation: Conversation, hello: Hello, deadlines: Deadlines) -> None:
        self.hello = hello
        self._qemu = qemu
        self._conversation = conversation
        self._deadlines = deadlines
        self._ended: Outcome | None = None
        self._console: str | None = None
        # Held by whoever talks to the agent.
        self._talking = threading.RLock()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def console(self) -> str:
        """What the guest's console has printed so far."""
        return self._qemu.console_text if self._console is None else self._console

    @property
    def pid(self) -> int:
        """The process number of its QEMU."""
        return self._qemu.pid

    @property
    def owed_s(self) -> float:
        """Seconds for which the agent has not answered while a command runs; may be read from any thread."""
        return self._conversation.owed_s

    def close(self) -> None:
        """End the guest at once, and wait until nothing is left of it. May be called again.

        A :meth:`run` in another thread returns then.
        """
        self._qemu.kill()
        with self._talking:
            if self._console is None:
                self._qemu.close()
                self._conversation.close()
                self._console = self._qemu.console_text

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        stdin: IO[bytes] | int | bytes | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
        on_report: Sink | None = None,
        timeout_s: float | None = None,
        terminal: bool = False,
        resized: Resized | None = None,
    ) -> Outcome:
        """Run `command` to its end, and end whatever it left running; how it ended.

        `env` is added to :data:`ENVIRONMENT`. What it writes is handed to the sinks as it comes: `on_report`
        gets what it writes to the descriptor named by ``UMM_REPORT_FD``. `stdin` is read only as fast as the
        command reads. With `terminal` it runs on a terminal whose size `resized` tells, and its output is
        stdout's. After a :class:`HarnessOutcome` the guest is closed.
        """
        size = (resized() if resized else None) or (24, 80)
        try:
            with self._talk():
                return self._conversation.run(
                    command,
                    cwd=cwd,
                    env=ENVIRONMENT | dict(env or {}),
                    stdin=stdin,
                    on_stdout=on_stdout,
                    on_stderr=on_stderr,
                    on_report=on_report,
                    timeout_s=timeout_s,
                    terminal=size if terminal else None,
                    resized=resized if terminal else None,
                )
        except GuestError as error:
            return error.outcome

    def put(self, path_in_guest: str, content: bytes | Path, mode: int = 0o644) -> None:
        """Write a file in the guest, its folders included.

        Raises :class:`GuestFileError` when that fails in the guest, OSError for a file that cannot be read
        here, and :class:`GuestError` when the guest has ended.
        """
        limit_s = self._deadlines.end_s
        with self._talk():
            if isinstance(content, Path):
                with content.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    chunks = iter(lambda: file.read(_CHUNK_BYTES), b"")
                    self._conversation.put(path_in_guest, size, mode, chunks, limit_s)
            else:
                self._conversation.put(path_in_guest, len(content), mode, iter([content]), limit_s)

    def get(self, patterns: Iterable[str]) -> Iterator[tuple[str, int, int, Iterator[bytes]]]:
        """Path, mode, size and bytes of each file in the guest that a glob pattern matches, folders walked.

        To be used in turn: see :meth:`Conversation.get`.
        """
        limit_s = self._deadlines.end_s
        with self._talk(), closing(self._conversation.get(list(patterns), limit_s)) as files:
            for info, chunks in files:
                yield info.path, info.mode, info.size, chunks

    def copy_out(self, patterns: Iterable[str], to: Path) -> list[Path]:
        """Copy what the patterns match into the folder `to`, under its path in the guest.

        Only regular files are made here, whatever the guest says they are. After all others were copied,
        raises the :class:`GuestFileError` of the first that could not be.
        """
        copied: list[Path] = []
        failed: GuestFileError | None = None
        for path, mode, _, chunks in self.get(patterns):
            target = to / _inside(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
            try:
                with part.open("xb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                part.chmod(0o600 | mode & 0o777)
                part.replace(target)
                copied.append(target)
            except GuestFileError as error:
                failed = failed or error
            finally:
                part.unlink(missing_ok=True)
        if failed is not None:
            raise failed
        return copied

    def ping(self, timeout_s: float) -> bool:
        """Whether the agent answers within `timeout_s` seconds, also while another thread runs a command."""
        if self._ended is not None or self._console is not None:
            return False
        if not self._talking.acquire(blocking=False):
            try:
                return self._conversation.answers(timeout_s)
            except OSError:  # closed at this moment
                return False
        try:
            return self._conversation.ping(timeout_s)
        except GuestError:
            return False
        finally:
            self._talking.release()

    def nudge(self) -> None:
        """Have `resized` of a :meth:`run` asked now; may be called by a signal handler."""
        if self._console is None:
            self._conversation.nudge()

    @contextmanager
    def _talk(self) -> Iterator[None]:
        """A request to the agent; a conversation that broke is of no more use: the guest is closed."""
        with self._talking:
            if self._ended is not None:
                raise GuestError(self._ended)
            if self._console is not None:
                raise InputError("the guest is closed")
            try:
                yield
            except GuestError as error:
                self._ended = error.outcome
                self.close()
                raise


def boot(
    kernel: Kernel,
    page_size: PageSize,
    root: RootFilesystem,
    machine: Machine = Machine(),  # noqa: B008 frozen
    *,
    deadlines: Deadlines = Deadlines(),  # noqa: B008 frozen
    progress: Progress = silent,
) -> Guest:
    """Boot a guest with this page size, and wait until it takes commands.

    Raises :class:`InputError` for what cannot work together, :class:`UnsupportedError` without QEMU, and
    :class:`GuestError` with the outcome when the guest does not come up; nothing is left of it then.
    """
    limits = deadlines.scaled(emulated=is_emulated())
    progress(f"booting a guest with {page_size} pages")
    with ExitStack() as undo:
        qemu = launch(kernel, page_size, root, machine)
        undo.callback(qemu.close)
        conversation = Conversation(qemu.agent, qemu, end_s=limits.end_s)
        undo.callback(conversation.close)
        try:
            hello = parse_hello(await_hello(qemu, conversation, page_size, limits, progress), page_size)
            # Kernels differ in whether they read the machine's clock; the entropy does no harm.
            conversation.set_clock(os.urandom(ENTROPY_BYTES), limits.end_s)
        except GuestError as error:
            error.console = qemu.console_text
            raise
        qemu.reports_panics = hello.reports_panics
        undo.pop_all()
        return Guest(qemu, conversation, hello, limits)


def await_hello(
    qemu: Qemu,
    conversation: Conversation,
    page_size: PageSize,
    limits: Deadlines,
    progress: Progress = silent,
) -> dict[str, str]:
    """What the agent says first; raises :class:`GuestError` when it says nothing in time."""
    _await_first_byte(qemu, limits.first_byte_s)
    progress(f"the kernel with {page_size} pages has started")
    return conversation.hello(limits.init_s)


def _await_first_byte(qemu: Qemu, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not qemu.has_spoken:
        left = deadline - time.monotonic()
        if left <= 0:
            raise GuestError(Silent(limit_s))
        ready, _, _ = select.select([qemu.fileno(), qemu.agent.fileno()], [], [], left)
        if ready == [qemu.agent.fileno()]:
            return  # it talks, though it prints nothing
        if ready:
            qemu.check()


def parse_hello(fields: Mapping[str, str], page_size: PageSize) -> Hello:
    """The record of `fields`; raises :class:`GuestError` for a guest with another page size than wanted."""
    try:
        hello = Hello(
            page_size=int(fields["page_size"]),
            release=fields["release"],
            machine=fields["machine"],
            cpus=int(fields["cpus"]),
            memory_bytes=int(fields["memory"]),
            reports_panics=fields["pvpanic"] == "1",
        )
    except (KeyError, ValueError) as error:
        raise GuestError(ChannelLost(f"HELLO: {ChannelError(str(error))}")) from error
    if hello.page_size != page_size.bytes:
        raise GuestError(WrongPageSize(page_size.bytes, hello.page_size))
    return hello


def _inside(path: str) -> PurePosixPath:
    """The path in the guest as one that stays below the folder it is copied to."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "//", "..", ".")]
    if not parts:
        raise InputError(f"{path!r}: no name of a file")
    return PurePosixPath(*parts)
