"""One QEMU process: started, listened to, and ended so that nothing of it stays.

All that connects us to it are inherited descriptors: there is no socket file to remove or to take over. A
thread of its own (the keeper) starts the process, reads the console and the monitor, and waits for the end.
It lives as long as QEMU: the order to kill QEMU with its parent is bound to the thread that forked
it (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from uspace_mm.errors import UnsupportedError, UspaceError
from uspace_mm.guest.boot import console
from uspace_mm.guest.boot.errors import GuestError
from uspace_mm.guest.outcome import Outcome, Panicked, PoweredOff, QemuFailed

_OUTPUT_MAX = 64 << 10
# The console comes byte by byte from an emulated UART: after the first, they are collected.
_CONSOLE_REST_S = 0.005
_END_S = 20.0


def find_qemu() -> Path:
    """QEMU for arm64 machines; raises :class:`UnsupportedError` when it is not on PATH."""
    found = shutil.which("qemu-system-aarch64")
    if found is None:
        raise UnsupportedError("qemu-system-aarch64 is not on PATH: install it (Debian: qemu-system-arm)")
    return Path(found)


class MonitorError(UspaceError):
    """QEMU's monitor refused a command, or did not answer."""


class Qemu:
    """A running QEMU. ``agent`` is our end of the channel; the console and the monitor are kept here."""

    def __init__(self, arguments: Sequence[str], *, agent: socket.socket, descriptors: Sequence[int]) -> None:
        """Start QEMU with `arguments`, which name `descriptors`; see :mod:`uspace_mm.guest.boot.launch`."""
        self.agent = agent
        self._arguments = list(arguments)
        self._descriptors = tuple(descriptors)
        self._lock = threading.Lock()
        self._console = console.Console()
        self._output = bytearray()
        self._events: list[dict[str, Any]] = []
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._monitor: socket.socket | None = None
        self._status: int | None = None
        self._failed: BaseException | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        #: Set once the agent said that the guest's kernel reports its panics to QEMU.
        self.reports_panics = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._keeper: threading.Thread | None = None

    def start(self, console_end: int, monitor: socket.socket) -> None:
        """Launch it; `console_end` and `monitor` are our ends, which the keeper closes."""
        self._monitor = monitor
        # Events and commands need the capabilities agreed on (docs/interop/qmp-spec.txt). This waits in the
        # socket, so that whatever we ask later comes after it.
        monitor.sendall(b'{"execute":"qmp_capabilities","id":0}\n')
        self._keeper = threading.Thread(
            target=self._keep, args=(console_end, monitor), name="qemu-keeper", daemon=True
        )
        self._keeper.start()
        self._started.wait()
        if self._failed is not None:
            failed = self._failed
            self.close()
            raise UnsupportedError(f"cannot start QEMU: {failed}") from failed

    def fileno(self) -> int:
        """Readable when :meth:`check` or :attr:`has_spoken` may have changed."""
        return self._wake

    @property
    def has_spoken(self) -> bool:
        """Whether a byte came on the console."""
        with self._lock:
            return not self._console.is_empty

    @property
    def console_text(self) -> str:
        with self._lock:
            return self._console.text

    def begin_console(self, before: bytes) -> None:
        """What the console had printed before the state was saved that this guest goes on from."""
        with self._lock:
            self._console.prepend(before)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """Raises :class:`GuestError` when the guest has ended, or is about to because its kernel panicked."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with self._lock:
            ended, events = self._status is not None, list(self._events)
        if not ended and any(event["event"] == "GUEST_PANICKED" for event in events):
            # QEMU ends by itself now, and the console is whole then.
            self._join(_END_S)
            ended = True
        if ended:
            raise GuestError(self._how_it_ended(events))

    def command(self, name: str, limit_s: float, **arguments: Any) -> Any:
        """What QEMU's monitor answers (docs/interop/qmp-spec.txt); raises :class:`MonitorError`."""
        assert self._monitor is not None
        try:
            self._monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            answer = self._answers.get(timeout=limit_s)
        except (OSError, queue.Empty) as error:
            raise MonitorError(f"QEMU did not answer {name}: {error or 'too late'}") from error
        if "return" not in answer:
            raise MonitorError(f"QEMU refused {name}: {answer['error'].get('desc')}")
        return answer["return"]

    def why_silent(self) -> Outcome | None:
        return PoweredOff("halted") if console.halted(self.console_text) else None

    def kill(self) -> None:
        """End it, from any thread; :meth:`check` will say so."""
        if self._process is not None:
            # Nothing in it is worth the time of an orderly end: disks are read-only, files came back before.
            self._process.kill()

    def close(self) -> None:
        """End it, if it still runs, and wait for that. May be called again."""
        self.kill()
        self._join(None)
        self.agent.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _join(self, limit_s: float | None) -> None:
        if self._keeper is not None:
            self._keeper.join(limit_s)

    def _how_it_ended(self, events: list[dict[str, Any]]) -> Outcome:
        text = self.console_text
        names = {event["event"] for event in events}
        # What the command printed is no proof where the kernel would have told QEMU.
        if "GUEST_PANICKED" in names or (not self.reports_panics and console.panicked(text)):
            return Panicked(console.crash_report(text))
        how: dict[str, Literal["powered off", "reset"]] = {
            "guest-shutdown": "powered off",
            "guest-reset": "reset",
        }
        for event in events:
            if event["event"] == "SHUTDOWN" and (said := how.get(event["data"].get("reason", ""))):
                return PoweredOff(said)
        return QemuFailed(self._status or 0, bytes(self._output).decode(errors="replace"))

    # What follows runs in the keeper.

    def _keep(self, console_end: int, monitor: socket.socket) -> None:
        output_read, output_write = os.pipe()
        try:
            with monitor, os.fdopen(output_read, "rb", 0) as output, os.fdopen(console_end, "rb", 0):
                try:
                    self._process = self._launch(output_write)
                except BaseException as error:
                    self._failed = error
                    return
                finally:
                    os.close(output_write)
                    for descriptor in self._descriptors:
                        os.close(descriptor)
                    if self._process is not None:
                        self._started.set()
                self._listen(self._process, console_end, monitor, output.fileno())
        finally:
            self._started.set()
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _launch(self, output: int) -> subprocess.Popen[bytes]:
        # A group of its own: Ctrl-C in the terminal is for us to act on.
        return subprocess.Popen(
            self._arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=self._descriptors,
            process_group=0,
        )

    def _listen(
        self, process: subprocess.Popen[bytes], console_end: int, monitor: socket.socket, output: int
    ) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            poller = select.poll()
            open_ends = {console_end, monitor.fileno(), output}
            for descriptor in (*open_ends, pidfd):
                poller.register(descriptor, select.POLLIN)
            lines = b""
            ended = False
            while open_ends:
                ready = {descriptor for descriptor, _ in poller.poll(0 if ended else None)}
                for descriptor in ready & open_ends:
                    data = _read(descriptor)
                    if not data:
                        poller.unregister(descriptor)
                        open_ends.discard(descriptor)
                    elif descriptor == monitor.fileno():
                        lines = self._take_events(lines + data)
                    else:
                        self._take(data, is_console=descriptor == console_end)
                if ended and not ready & open_ends:
                    break
                ended = ended or pidfd in ready
                if not ended and console_end in ready:
                    time.sleep(_CONSOLE_REST_S)
        finally:
            os.close(pidfd)
        status = process.wait()
        with self._lock:
            self._status = status

    def _take(self, data: bytes, *, is_console: bool) -> None:
        with self._lock:
            is_first = is_console and self._console.is_empty
            if is_console:
                self._console.add(data)
            elif len(self._output) < _OUTPUT_MAX:
                self._output += data
        if is_first:
            os.eventfd_write(self._wake, 1)

    def _take_events(self, data: bytes) -> bytes:
        *lines, rest = data.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if not isinstance(message, dict):
                continue
            if "id" not in message and ("return" in message or "error" in message):
                self._answers.put(message)
            if "event" in message:
                with self._lock:
                    self._events.append({"event": message["event"], "data": message.get("data") or {}})
                if message["event"] == "GUEST_PANICKED":
                    os.eventfd_write(self._wake, 1)
        return rest


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionResetError:
        return b""
