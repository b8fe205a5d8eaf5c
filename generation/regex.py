"""Regular expressions as automata over UTF-8 bytes.

Understood are literals, escapes (\\d \\w \\s and their negations over ASCII, \\n \\t \\xHH \\uHHHH and the like), classes, groups, |, ?,
*, + and {m,n} (a lazy or possessive mark changes nothing: a language has no greed), and ^ and $ at the ends, where they stand for
themselves. There are no look-arounds, back-references or word boundaries.

Axis letters: A states."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np

Ranges = list[tuple[int, int]]  # of code points, both ends included
LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
DIGITS: Ranges = [(48, 57)]
WORD: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
SPACE: Ranges = [(9, 13), (32, 32)]
CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7, "0": 0}
MAX_STATES = 20_000


def compile_regex(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """goto [A,256] int32, -1 where no byte may follow, and the accepting states bool [A] of the automaton for whole texts that the
    pattern matches; it begins in state 0, and from every state an accepting one can be reached. ValueError for what is not understood
    and for a pattern that matches nothing."""
    parser = _Parser(pattern)
    start, end = parser.parse()
    return _determine(parser.edges, parser.jumps, start, end, pattern)


class _Parser:
    """A recursive descent that builds a nondeterministic automaton: `edges` of byte ranges and `jumps` without one."""

    def __init__(self, pattern: str) -> None:
        self.text, self.at = pattern, 0
        self.edges: list[list[tuple[int, int, int]]] = []
        self.jumps: list[list[int]] = []

    def state(self) -> int:
        self.edges.append([])
        self.jumps.append([])
        return len(self.edges) - 1

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self.at} of the regular expression {self.text!r}")

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, wanted: str = "") -> str:
        char = self.peek()
        if not char or (wanted and char != wanted):
            raise self.fail(f"expected {wanted or 'a character'!r}, found {char or 'the end'!r}")
        self.at += 1
        return char

    def parse(self) -> tuple[int, int]:
        if self.peek() == "^":
            self.at += 1
        ends = self.alternatives()
        if self.at < len(self.text):
            raise self.fail(f"unbalanced {self.peek()!r}")
        return ends

    def alternatives(self) -> tuple[int, int]:
        start, end = self.state(), self.state()
        while True:
            first, last = self.sequence()
            self.jumps[start].append(first)
            self.jumps[last].append(end)
            if self.peek() != "|":
                return start, end
            self.at += 1

    def sequence(self) -> tuple[int, int]:
        start = end = self.state()
        while self.peek() not in ("", "|", ")"):
            if self.peek() == "$" and self.text[self.at + 1 : self.at + 2] in ("", ")", "|"):
                self.at += 1
                continue
            first, last = self.repeated()
            self.jumps[end].append(first)
            end = last
        return start, end

    def repeated(self) -> tuple[int, int]:
        begin = self.at
        first, last = self.atom()
        stop = self.at
        low, high = self.bounds()
        if (low, high) == (1, 1):
            return first, last
        start = end = self.state()
        copies = max(low, high if high is not None else low, 1)
        after = self.at
        for n in range(copies):
            if n:
                self.at = begin
                first, last = self.atom()
                assert self.at == stop
            self.jumps[end].append(first)
            if n >= low:
                self.jumps[first].append(last)
            if n == copies - 1 and high is None:
                self.jumps[last].append(first)
            end = last
        self.at = after
        if high == 0:
            return start, start
        return start, end

    def bounds(self) -> tuple[int, int | None]:
        char = self.peek()
        found = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self.text, self.at) if char == "{" else None
        if char and char in "*+?":
            self.at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        elif found and (found[1] or found[3]):
            self.at = found.end()
            low = int(found[1] or 0)
            high = int(found[3]) if found[3] else None if found[2] else low
            if high is not None and high < low:
                raise self.fail(f"{found[0]} has its limits the wrong way round")
        else:
            return 1, 1
        if self.peek() and self.peek() in "?+":
            self.at += 1
        return low, high

    def atom(self) -> tuple[int, int]:
        char = self.take()
        if char == "(":
            if self.peek() == "?":
                mark = re.compile(r"\?(:|P?<[A-Za-z_]\w*>)").match(self.text, self.at)
                if not mark:
                    raise self.fail("look-arounds, flags and other (?…) groups are not supported")
                self.at = mark.end()
            ends = self.alternatives()
            self.take(")")
            return ends
        if char == "[":
            return self.ranges(self.bracket())
        if char == ".":
            return self.ranges(_negate([(10, 10)]))
        if char == "\\":
            return self.ranges(self.escape())
        if char in "*+?^$":
            raise self.fail(f"{char!r} stands where nothing can be repeated or anchored")
        return self.ranges([(ord(char), ord(char))])

    def escape(self) -> Ranges:
        char = self.take()
        if char in "dDwWsS":
            ranges = {"d": DIGITS, "w": WORD, "s": SPACE}[char.lower()]
            return ranges if char.islower() else _negate(ranges)
        if char in "xu":
            digits = self.text[self.at : self.at + (2 if char == "x" else 4)]
            if not re.fullmatch(r"[0-9A-Fa-f]{2}|[0-9A-Fa-f]{4}", digits):
                raise self.fail(f"\\{char} needs {2 if char == 'x' else 4} hexadecimal digits")
            self.at += len(digits)
            return [(int(digits, 16),) * 2]
        if char in CONTROLS:
            return [(CONTROLS[char],) * 2]
        if char.isalnum():
            raise self.fail(f"\\{char} is not supported")
        return [(ord(char), ord(char))]

    def bracket(self) -> Ranges:
        negated = self.peek() == "^"
        self.at += negated
        found: Ranges = []
        first = True
        while self.peek() != "]" or first:
            first = False
            low = self.member()
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "") and low[0][0] == low[0][1] and len(low) == 1:
                self.at += 1
                high = self.member()
                if len(high) != 1 or high[0][0] < low[0][0]:
                    raise self.fail("a range of characters the wrong way round")
                low = [(low[0][0], high[0][1])]
            found += low
        self.take("]")
        return _negate(found) if negated else found

    def member(self) -> Ranges:
        char = self.take()
        if char == "\\":
            if self.peek() == "b":
                self.at += 1
                return [(8, 8)]
            return self.escape()
        return [(ord(char), ord(char))]

    def ranges(self, ranges: Ranges) -> tuple[int, int]:
        """A character in one of the ranges."""
        start, end = self.state(), self.state()
        for low, high in _merge(ranges):
            for sequence in _utf8(low, high):
                at = start
                for n, (a, b) in enumerate(sequence):
                    to = end if n == len(sequence) - 1 else self.state()
                    self.edges[at].append((a, b, to))
                    at = to
        return start, end


def _merge(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _negate(ranges: Ranges) -> Ranges:
    found, at = [], 0
    for low, high in [*_merge(ranges), (LAST + 1, LAST + 1)]:
        if low > at:
            found.append((at, low - 1))
        at = high + 1
    return found


def _utf8(low: int, high: int) -> Iterable[list[tuple[int, int]]]:
    """Code points low to high as sequences of byte ranges; surrogates have no UTF-8."""
    if low <= SURROGATES[1] and high >= SURROGATES[0]:
        if low < SURROGATES[0]:
            yield from _utf8(low, SURROGATES[0] - 1)
        if high > SURROGATES[1]:
            yield from _utf8(SURROGATES[1] + 1, high)
        return
    for limit in (0x7F, 0x7FF, 0xFFFF):
        if low <= limit < high:
            yield from _utf8(low, limit)
            yield from _utf8(limit + 1, high)
            return
    for shift in (6, 12, 18):
        block = (1 << shift) - 1
        if low >> shift != high >> shift:  # cut where whole blocks of the last bytes begin and end
            if low & block:
                yield from _utf8(low, low | block)
                yield from _utf8((low | block) + 1, high)
                return
            if high & block != block:
                yield from _utf8(low, (high & ~block) - 1)
                yield from _utf8(high & ~block, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode()))


def _determine(
    edges: list[list[tuple[int, int, int]]], jumps: list[list[int]], start: int, end: int, pattern: str
) -> tuple[np.ndarray, np.ndarray]:
    """Subsets of states, and of these those from which `end` can be reached."""

    def close(states: Iterable[int]) -> frozenset[int]:
        found, left = set(states), list(states)
        while left:
            for to in jumps[left.pop()]:
                if to not in found:
                    found.add(to)
                    left.append(to)
        return frozenset(state for state in found if edges[state] or state == end)

    closed = {state: close([state]) for state in {start, *(to for each in edges for *_, to in each)}}
    subsets = {closed[start]: 0}
    rows: list[np.ndarray] = []
    for subset in (order := [closed[start]]):
        row = np.full(256, -1, np.int32)
        out = [edge for state in subset for edge in edges[state]]
        cuts = sorted({a for a, _, _ in out} | {b + 1 for _, b, _ in out})
        for a, b in itertools.pairwise(cuts):
            reached = frozenset().union(*(closed[to] for low, high, to in out if low <= a and b - 1 <= high))
            if reached:
                if reached not in subsets:
                    subsets[reached] = len(order)
                    order.append(reached)
                    if len(order) > MAX_STATES:
                        raise ValueError(f"the regular expression needs more than {MAX_STATES} states: {pattern[:200]!r}")
                row[a:b] = subsets[reached]
        rows.append(row)
    goto, accept = np.stack(rows), np.array([end in subset for subset in order])
    alive = accept.copy()
    while True:
        more = alive | (alive[np.maximum(goto, 0)] & (goto >= 0)).any(1)
        if (more == alive).all():
            break
        alive = more
    if not alive[0]:
        raise ValueError(f"no text matches the regular expression {pattern!r}")
    number = np.where(alive, np.cumsum(alive) - 1, -1)
    goto = np.where(goto >= 0, number[np.maximum(goto, 0)], -1).astype(np.int32)
    return goto[alive], accept[alive]
