"""The host's side of the conversation with the agent: commands, files and pings over one stream.

One thread, one loop: it waits for the channel, for the watcher (has the guest ended?) and for what feeds the
command's stdin, never longer than the deadline of the request.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import IO, NoReturn, Protocol, TypeVar
from zlib import crc32

from uspace_mm.guest import channel
from uspace_mm.guest.boot.errors import GuestError, GuestFileError
from uspace_mm.guest.boot.feed import Feed
from uspace_mm.guest.channel import ChannelError, Decoder, Encoder, ExitHow, Frame, FrameType
from uspace_mm.guest.outcome import (
    ChannelLost,
    Exited,
    Killed,
    NotStarted,
    Outcome,
    Phase,
    SetUpFailed,
    TimedOut,
)

Sink = Callable[[bytes], object]
# The new rows and columns of the terminal, None while they are the same.
Resized = Callable[[], tuple[int, int] | None]
_T = TypeVar("_T")

_READ_BYTES = 1 << 18
_PUT_BYTES = 1 << 18
# No sign of life for so long, and the agent is asked for one; no answer for `end_s`, and it counts as dead.
_QUIET_S = 10.0
_UNSENT_MAX = 1 << 20
_OF_A_FILE = (FrameType.FILE_DATA, FrameType.FILE_END)
_AFTER_FILES = (FrameType.GOT, FrameType.FAULT)


class Watcher(Protocol):
    """Knows whether what is on the other end still runs."""

    def fileno(self) -> int:
        """Readable when :meth:`check` may have something to say."""

    def check(self) -> None:
        """Raises :class:`GuestError` when the guest has ended."""

    def why_silent(self) -> Outcome | None:
        """What is known of a guest that runs on and does not answer."""


class Conversation:
    """Talks to the agent on `stream`, which it makes non-blocking and does not close.

    A request raises :class:`GuestError` when the conversation cannot go on; it is of no use after that.
    Requests are for one thread at a time; :meth:`answers` may be asked meanwhile from others.
    """

    def __init__(self, stream: socket.socket, watcher: Watcher | None = None, *, end_s: float = 60.0) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._watcher = watcher
        self._end_s = end_s
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._received: list[Frame] = []
        self._last_id = 0
        self._last_heard = time.monotonic()
        self._asked: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._heard = threading.Condition()

    def resume_after_hello(self) -> None:
        """Go on where the agent said HELLO and we had said nothing: its state was saved there."""
        self._decoder = Decoder(sequence=1)

    def close(self) -> None:
        """Give back what it holds; the stream is the caller's."""
        os.close(self._wake)

    def hello(self, limit_s: float) -> dict[str, str]:
        """The fields of the agent's HELLO; raises with SetUpFailed, or TimedOut in the phase "init"."""
        frame = self._expect(FrameType.HELLO, 0, "init", limit_s)
        return self._parsed(channel.parse_hello, frame.payload)

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        stdin: IO[bytes] | int | bytes | None = None,
        on_stdout: Sink | None = None,
        on_stderr: Sink | None = None,
        on_report: Sink | None = None,
        timeout_s: float | None = None,
        terminal: tuple[int, int] | None = None,
        resized: Resized | None = None,
    ) -> Outcome:
        """How `argv` ended; what it writes goes to the sinks as it comes.

        `terminal` is (rows, columns) of a terminal to run it on; `resized` is asked each time for new ones.
        """
        feed = Feed(stdin)
        id_ = self._new_id()
        payload = channel.start_payload(
            list(argv), cwd=cwd, env=env, terminal=terminal, stdin=not feed.is_empty
        )
        sinks = {FrameType.STDOUT: on_stdout, FrameType.STDERR: on_stderr, FrameType.REPORT: on_report}
        self._send(FrameType.START, payload, id_)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        window = channel.STDIN_WINDOW
        while True:
            while (data := feed.take(window)) is not None:
                self._send(FrameType.STDIN, data, id_)
                window -= len(data)
            frame = self._next(deadline, ("command", timeout_s or 0.0), feed if window else None)
            if resized is not None and (size := resized()) is not None:
                self._send(FrameType.RESIZE, struct.pack("<2I", *size), id_)
            if frame is None or frame.id != id_:
                continue
            if frame.type is FrameType.CREDIT:
                window += self._parsed(lambda p: channel.parse_number(p, "CREDIT"), frame.payload)
            elif frame.type is FrameType.EXIT:
                return self._outcome(argv[0], self._parsed(channel.parse_exit, frame.payload))
            elif frame.type is FrameType.FAULT:
                errno, text = self._parsed(channel.parse_fault, frame.payload)
                return NotStarted(argv[0], errno, text)
            elif (sink := sinks.get(frame.type)) is not None:
                sink(frame.payload)

    @property
    def owed_s(self) -> float:
        """Seconds since the agent was last asked for a sign of life and has not given one; 0 when it has."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def put(self, path: str, size: int, mode: int, chunks: Iterator[bytes], limit_s: float) -> None:
        """Write a file of `size` bytes in the guest; raises :class:`GuestFileError` when that fails there."""
        id_, crc, left = self._new_id(), 0, size
        deadline = time.monotonic() + limit_s
        self._send(FrameType.PUT, channel.put_payload(path, size, mode), id_)
        for chunk in chunks:
            # A file that grows while it is read is cut at the size announced, one that shrinks is refused.
            for begin in range(0, min(len(chunk), left), _PUT_BYTES):
                part = chunk[begin : min(begin + _PUT_BYTES, left)]
                crc = crc32(part, crc)
                self._send(FrameType.PUT_DATA, part, id_)
            left -= min(len(chunk), left)
            while len(self._unsent) > _UNSENT_MAX:
                self._step(deadline, ("end", limit_s))
            if not left:
                break
        if left:
            raise self._lost(f"{path}: {left} bytes fewer than announced could be read for it")
        self._send(FrameType.PUT_END, struct.pack("<I", crc), id_)
        answer = self._wait(id_, (FrameType.GOT, FrameType.FAULT), deadline, limit_s)
        if answer.type is FrameType.FAULT:
            raise GuestFileError(path, self._parsed(channel.parse_fault, answer.payload)[0], "writing")

    def get(
        self, patterns: Sequence[str], limit_s: float
    ) -> Generator[tuple[channel.FileInfo, Iterator[bytes]], None, None]:
        """The files that the patterns match, each with its bytes.

        The bytes of a file have to be used before the next one is asked for, they are lost then; iterating
        over them raises :class:`GuestFileError` at the end when the file could not be read whole.
        """
        id_ = self._new_id()
        deadline = time.monotonic() + limit_s
        self._send(FrameType.GET, channel.texts(patterns), id_)
        count, last = 0, FrameType.GET
        try:
            while True:
                frame = self._wait(id_, (*_OF_A_FILE, FrameType.FILE, *_AFTER_FILES), deadline, limit_s)
                last = frame.type
                if last is FrameType.FAULT:
                    errno, text = self._parsed(channel.parse_fault, frame.payload)
                    raise GuestFileError(text, errno, "reading")
                if last is FrameType.GOT:
                    said = self._parsed(lambda p: channel.parse_number(p, "GOT"), frame.payload)
                    if said != count:
                        raise self._lost(f"{count} files came, the agent sent {said}")
                    return
                if last is FrameType.FILE:
                    count += 1
                    info = self._parsed(channel.parse_file, frame.payload)
                    yield info, self._chunks(info, id_, deadline, limit_s)
        except GeneratorExit:
            # The agent takes nothing else before all was sent.
            while last not in _AFTER_FILES:
                frame = self._wait(id_, (*_OF_A_FILE, FrameType.FILE, *_AFTER_FILES), deadline, limit_s)
                last = frame.type
            raise

    def ping(self, timeout_s: float) -> bool:
        """Whether the agent answers in time."""
        id_ = self._new_id()
        self._send(FrameType.PING, b"ping", id_)
        try:
            return self._wait(id_, (FrameType.PONG,), time.monotonic() + timeout_s, timeout_s).id == id_
        except GuestError as error:
            if isinstance(error.outcome, TimedOut):
                return False
            raise

    def answers(self, timeout_s: float) -> bool:
        """Whether the agent answers in time, while another thread runs a command."""
        asked = time.monotonic()
        self.nudge()
        with self._heard:
            return self._heard.wait_for(lambda: self._last_heard > asked, timeout_s)

    def nudge(self) -> None:
        """Wake whoever waits in a request: it asks the agent for a sign of life."""
        os.eventfd_write(self._wake, 1)

    def set_clock(self, entropy: bytes, limit_s: float) -> None:
        """Set the guest's clock to ours, and add `entropy` (at most 512 bytes) to its random numbers."""
        id_ = self._new_id()
        self._send(FrameType.CLOCK, struct.pack("<Q", time.time_ns()) + entropy, id_)
        deadline = time.monotonic() + limit_s
        frame = self._wait(id_, (FrameType.PONG, FrameType.FAULT), deadline, limit_s)
        if frame.type is FrameType.FAULT:
            raise GuestError(SetUpFailed(self._parsed(channel.parse_fault, frame.payload)[1]))

    def _chunks(self, info: channel.FileInfo, id_: int, deadline: float, limit_s: float) -> Iterator[bytes]:
        crc = 0
        while True:
            frame = self._wait(id_, _OF_A_FILE, deadline, limit_s)
            if frame.type is FrameType.FILE_END:
                break
            crc = crc32(frame.payload, crc)
            yield frame.payload
        said, errno = self._parsed(channel.parse_file_end, frame.payload)
        if errno:
            raise GuestFileError(info.path, errno, "reading")
        if said != crc:
            raise self._lost(f"{info.path}: checksum {crc:#010x}, the agent says {said:#010x}")

    def _outcome(self, command: str, exit_: channel.ExitInfo) -> Outcome:
        if exit_.how is ExitHow.STATUS:
            return Exited(exit_.number)
        if exit_.how is ExitHow.SIGNAL:
            return Killed(exit_.number, exit_.core_dumped, exit_.out_of_memory)
        return NotStarted(command, exit_.number, exit_.text)

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _send(self, type_: FrameType, payload: bytes, id_: int) -> None:
        self._unsent += self._encoder.encode(type_, payload, id_)
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._stream.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                # Why the other side closed is often on its way; the watcher knows better.
                self._ended(error.strerror or str(error))
            del self._unsent[:sent]

    def _expect(self, type_: FrameType, id_: int, phase: Phase, limit_s: float) -> Frame:
        deadline = time.monotonic() + limit_s
        while True:
            frame = self._next(deadline, (phase, limit_s))
            if frame is None:
                continue
            if frame.type is FrameType.FAULT and frame.id == 0:
                raise GuestError(SetUpFailed(self._parsed(channel.parse_fault, frame.payload)[1]))
            if frame.type is type_ and frame.id == id_:
                return frame
            raise self._lost(f"{frame.type.name} came where {type_.name} was expected")

    def _wait(self, id_: int, types: tuple[FrameType, ...], deadline: float, limit_s: float) -> Frame:
        """The next frame of these types for this request; others of older requests are dropped."""
        while True:
            frame = self._next(deadline, ("end", limit_s))
            if frame is None or frame.id != id_:
                continue
            if frame.type in types:
                return frame
            raise self._lost(f"{frame.type.name} came where {types[0].name} was expected")

    def _next(
        self, deadline: float | None, phase: tuple[Phase, float], feed: Feed | None = None
    ) -> Frame | None:
        """The next frame, or None when something else happened that the caller may want to look at."""
        if not self._received:
            self._step(deadline, phase, feed)
        return self._received.pop(0) if self._received else None

    def _step(self, deadline: float | None, phase: tuple[Phase, float], feed: Feed | None = None) -> None:
        """Wait once for anything, and take it."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise GuestError(TimedOut(*phase))
        poller = select.poll()
        poller.register(self._stream, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poller.register(self._wake, select.POLLIN)
        if self._watcher is not None:
            poller.register(self._watcher.fileno(), select.POLLIN)
        if feed is not None and feed.descriptor is not None:
            poller.register(feed.descriptor, select.POLLIN)
        rest_s = _QUIET_S if self._asked is None else 1.0
        wait_s = rest_s if deadline is None else min(rest_s, deadline - now)
        ready = dict(poller.poll(wait_s * 1000 + 1))
        if self._stream.fileno() in ready:
            self._flush()
            self._receive()
        if self._wake in ready:
            os.eventfd_read(self._wake)
            self._send(FrameType.PING, b"", 0)
        if self._watcher is not None and self._watcher.fileno() in ready and not self._received:
            self._watcher.check()
        if feed is not None and feed.descriptor in ready:
            feed.read()
        if phase[0] == "command":
            self._look_for_life()

    def _receive(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error.strerror or str(error))
        if not data:
            try:
                self._decoder.finish()
            except ChannelError as error:
                self._ended(str(error))
            self._ended("the other side closed it")
        with self._heard:
            self._last_heard, self._asked = time.monotonic(), None
            self._heard.notify_all()
        try:
            self._received += self._decoder.feed(data)
        except ChannelError as error:
            raise self._lost(str(error)) from error

    def _look_for_life(self) -> None:
        now = time.monotonic()
        if self._asked is None and now - self._last_heard >= _QUIET_S:
            self._asked = now
            self._send(FrameType.PING, b"", 0)
        elif self._asked is not None and now - self._asked >= 1.0:
            silent = self._watcher.why_silent() if self._watcher is not None else None
            if silent is not None:
                raise GuestError(silent)
            if now - self._asked >= self._end_s:
                raise self._lost(f"the agent did not answer for {self._end_s:g} s")

    def _ended(self, reason: str) -> NoReturn:
        """The stream ended: how the guest ended is the watcher's to say, who may hear of it a bit later."""
        deadline = time.monotonic() + 2.0
        while self._watcher is not None and (left := deadline - time.monotonic()) > 0:
            self._watcher.check()
            select.select([self._watcher], [], [], left)
        raise self._lost(reason)

    def _lost(self, reason: str) -> GuestError:
        return GuestError(ChannelLost(reason))

    def _parsed(self, parse: Callable[[bytes], _T], payload: bytes) -> _T:
        try:
            return parse(payload)
        except ChannelError as error:
            raise self._lost(str(error)) from error
