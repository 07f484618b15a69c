"""The work that moves: an inverted index of a text, in tables that keep changing in place.

All of it lives in one piece of memory: a header, a hash table of words (open addressing), a ring of
postings, and the text. A step reads the next chunk of the text and enters its words. Steps are
deterministic: the same memory and the same number of steps give the same bytes, wherever they run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from uspace_mm.errors import InputError

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

MINIMUM_BYTES = 1 << 20
# Sections start at multiples of the largest base page there is, so that no page holds two of them.
_ALIGN = 1 << 16
_CHUNK = 1 << 16
_MOST_PROBES = 64
_WORD = np.zeros(256, np.bool_)
_WORD[np.frombuffer(b"_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", np.uint8)] = True
_WORD[128:] = True  # UTF-8

# Rolling hash: a word's hash is a difference of prefix sums, so that all words of a chunk take a few
# array operations. The base is odd, hence has an inverse modulo 2**64.
_BASE = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _powers(base: int) -> U64:
    powers = np.full(_CHUNK + 1, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_POWERS = _powers(_BASE)
_INVERSE_POWERS = _powers(pow(_BASE, -1, 1 << 64))

_STEPS, _CURSOR, _WORDS, _POSTINGS, _OVERFLOW, _LINES, _PASSES = range(7)


@dataclass(frozen=True)
class Layout:
    """Where things are in `size` bytes: offsets in bytes, numbers of entries."""

    size: int
    slots: int
    postings: int
    text_offset: int

    @classmethod
    def of(cls, size: int) -> Layout:
        """The layout of `size` bytes: 1/16 hash table, 1/4 postings, the rest text."""
        if size < MINIMUM_BYTES:
            raise InputError(f"size {size}: the demo needs at least {MINIMUM_BYTES} bytes (1M)")
        slots = 1 << ((size // 16 // 32).bit_length() - 1)
        postings = size // 4 // 16 // (_ALIGN // 8) * (_ALIGN // 8) or _ALIGN // 8
        return cls(size, slots, postings, _ALIGN + cls._up(32 * slots) + 16 * postings)

    @staticmethod
    def _up(offset: int) -> int:
        return -(-offset // _ALIGN) * _ALIGN

    @property
    def text_bytes(self) -> int:
        return self.size - self.text_offset


def _mix(value: U64) -> U64:
    """Spread the bits (the finalizer of MurmurHash3)."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


class Index:
    """The work over `memory` (bytes). Nothing outside of the memory changes."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.layout = layout = Layout.of(memory.nbytes)
        at = _ALIGN

        def take(entries: int) -> U64:
            nonlocal at
            array = memory[at : at + entries * 8].view(np.uint64)
            at += entries * 8
            return array

        self.header: U64 = memory[: 16 * 8].view(np.uint64)
        self.keys, self.counts, self.last = take(layout.slots), take(layout.slots), take(layout.slots)
        self.heads = take(layout.slots)
        at = Layout._up(at)
        self.previous, self.positions = take(layout.postings), take(layout.postings)
        self.text = memory[layout.text_offset :]

    def _chunk(self, start: int) -> npt.NDArray[np.uint8]:
        """The next bytes, up to the end of a word."""
        chunk = self.text[start : start + _CHUNK]
        if start + _CHUNK < self.text.nbytes:
            gaps = np.flatnonzero(~_WORD[chunk[-256:]])
            if gaps.size:
                chunk = chunk[: chunk.nbytes - min(256, chunk.nbytes) + int(gaps[-1]) + 1]
        return chunk

    @staticmethod
    def _words(chunk: npt.NDArray[np.uint8]) -> tuple[U64, I64]:
        """Hash (never 0) and start of every word of `chunk`."""
        inside = np.zeros(chunk.nbytes + 2, np.int8)
        inside[1:-1] = _WORD[chunk]
        edges = np.diff(inside)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        prefix = np.zeros(chunk.nbytes + 1, np.uint64)
        np.cumsum((chunk.astype(np.uint64) + np.uint64(1)) * _POWERS[: chunk.nbytes], out=prefix[1:])
        return _mix((prefix[ends] - prefix[starts]) * _INVERSE_POWERS[starts]) | np.uint64(1), starts

    def _slots(self, keys: U64) -> I64:
        """The slot of each of the different `keys`, claimed if it is new; -1 where the table has no room."""
        mask = np.uint64(self.layout.slots - 1)
        slots = (keys >> np.uint64(1) & mask).astype(np.int64)
        found = np.full(keys.size, -1, np.int64)
        left = np.arange(keys.size)
        for _ in range(_MOST_PROBES):
            at, wanted = slots[left], keys[left]
            free = self.keys[at] == 0
            # Of several new words for one slot the last one wins; the others see its key and go on.
            self.keys[at[free]] = wanted[free]
            here = self.keys[at] == wanted
            found[left[here]] = at[here]
            left = left[~here]
            if not left.size:
                break
            slots[left] = (slots[left] + 1) & int(mask)
        return found

    def _enter(self, slots: I64, positions: U64) -> None:
        """Append a posting for each word, linked to the previous one of the same word."""
        total, room = int(self.header[_POSTINGS]), self.layout.postings
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        numbers = (order + total + 1).astype(np.uint64)  # from 1: 0 is "none"
        first = np.ones(ordered.size, np.bool_)
        first[1:] = ordered[1:] != ordered[:-1]
        before = np.empty(ordered.size, np.uint64)
        before[1:] = numbers[:-1]
        before[first] = self.heads[ordered[first]]
        last = np.roll(first, -1)
        last[-1] = True
        self.heads[ordered[last]] = numbers[last]
        self.last[ordered[last]] = positions[order][last]
        at = (order + total) % room
        self.previous[at], self.positions[at] = before, positions[order]
        self.header[_POSTINGS] += np.uint64(slots.size)

    def step(self) -> None:
        """Enter the words of the next chunk of the text; after the end it starts again."""
        start = int(self.header[_CURSOR])
        chunk = self._chunk(start)
        keys, starts = self._words(chunk)
        if keys.size:
            different, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
            slots = self._slots(different)
            known = slots >= 0
            self.counts[slots[known]] += counts[known].astype(np.uint64)
            of_word = slots[inverse]
            entered = of_word >= 0
            self.header[_OVERFLOW] += np.uint64(entered.size - np.count_nonzero(entered))
            if entered.any():
                self._enter(of_word[entered], (starts[entered] + start).astype(np.uint64))
        self.header[_WORDS] += np.uint64(keys.size)
        self.header[_LINES] += np.uint64(np.count_nonzero(chunk == 10))
        end = start + chunk.nbytes
        if end >= self.text.nbytes:
            end = 0
            self.header[_PASSES] += np.uint64(1)
        self.header[_CURSOR] = end
        self.header[_STEPS] += np.uint64(1)

    @property
    def steps(self) -> int:
        """Steps done since the memory was all zero."""
        return int(self.header[_STEPS])

    def totals(self) -> dict[str, int]:
        """Words, lines, passes over the text, and words that the table had no room for."""
        return {
            "words": int(self.header[_WORDS]),
            "lines": int(self.header[_LINES]),
            "passes": int(self.header[_PASSES]),
            "overflow": int(self.header[_OVERFLOW]),
        }

    def word_at(self, position: int) -> str:
        """The word that starts at `position` of the text."""
        window = self.text[position : position + 256]
        ends = np.flatnonzero(~_WORD[window])
        return window[: ends[0] if ends.size else None].tobytes().decode("utf-8", "replace")

    def most_frequent(self, count: int) -> list[tuple[str, int]]:
        """The `count` words that occur most often, with their numbers."""
        count = min(count, self.layout.slots)
        top = np.argpartition(self.counts, -count)[-count:]
        top = top[np.argsort(self.counts[top], kind="stable")[::-1]]
        return [
            (self.word_at(int(self.last[slot])), int(self.counts[slot])) for slot in top if self.counts[slot]
        ]

    def occurrences(self, word: bytes) -> list[int]:
        """Positions of `word` in the text, newest first, as far back as the ring of postings reaches."""
        keys, _ = self._words(np.frombuffer(word, np.uint8))
        mask = self.layout.slots - 1
        for probe in range(_MOST_PROBES):
            slot = ((int(keys[0]) >> 1) + probe) & mask
            if self.keys[slot] == keys[0]:
                break
        else:
            return []
        found, number, total = [], int(self.heads[slot]), int(self.header[_POSTINGS])
        while number and number > total - self.layout.postings:
            at = (number - 1) % self.layout.postings
            found.append(int(self.positions[at]))
            number = int(self.previous[at])
        return found

    def digest(self) -> str:
        """BLAKE2b of every byte of the memory: text, tables and header."""
        return hashlib.blake2b(self.memory.data, digest_size=16).hexdigest()
