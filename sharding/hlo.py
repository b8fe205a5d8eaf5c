"""What a compiled program does, read from its text: collectives, traffic to memory, kernels, large buffers.

XLA's own cost analysis counts a loop's body once and its seconds are not to be trusted (they were seen negative); here every
computation counts as often as its loops run it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

ITEM = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
ITEM |= {"f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota", "partition-id",
    "replica-id", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update",
}  # fmt: skip  # no traffic of their own: what they run or began counts where it stands
VMEM = re.compile(r"S\(\d+\)")  # a layout that says another memory than HBM

_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program's text."""

    name: str
    shape: str
    opcode: str
    arguments: str
    rest: str  # attributes

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    @property
    def source(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\'", "'") if found else self.name


@dataclasses.dataclass(frozen=True)
class Collective:
    """`bytes`: the larger of what a device puts in and gets out. `group`: devices that take part together. `count`: how often it runs."""

    kind: str
    bytes: int
    group: int
    count: int
    source: str


@dataclasses.dataclass(frozen=True)
class Program:
    """`traffic`: bytes between memory and the chip's cores, every operand and result of every kernel; where there are `unknown_loops`,
    whose length the text does not say, of one turn of these alone, and `around` what comes before and after. `buffers`: the largest
    results, (bytes, source). `kernels`: custom calls by target."""

    collectives: tuple[Collective, ...]
    traffic: int
    around: int
    buffers: tuple[tuple[int, str], ...]
    kernels: dict[str, int]
    unknown_loops: int


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, lies in HBM) of every array of a shape or tuple of shapes."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in ITEM:
            yield int(ITEM[dtype] * math.prod(int(d) for d in dims.split(",") if d)), not VMEM.search(layout)


def size(shape: str, hbm: bool = True) -> int:
    """Bytes of a shape, `hbm`: of what lies in HBM alone."""
    return sum(n for n, inside in arrays(shape) if inside or not hbm)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: its instructions} and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif (found := _LINE.match(line)) and name:
            shape, call = _cut(found[2])
            opcode, _, tail = call.partition("(")
            inside, rest = _cut("(" + tail)
            computations[name].append(Instruction(found[1], shape, opcode.strip(), inside[1:-1], rest))
    return computations, entry


def _cut(text: str) -> tuple[str, str]:
    """A leading parenthesised group, or a word, and what follows."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :].lstrip()
    return text, ""


def _called(instruction: Instruction) -> list[str]:
    found = re.findall(
        r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computation)=%([\w.\-]+)", instruction.rest
    )
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        found += _NAME.findall(group)
    return found


def _trips(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a while loop runs: as its text says, or by the bound that its condition compares a counter from 0 with."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', instruction.rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", instruction.rest)
    pending = [condition[1]] if condition else []
    constants: list[int] = []
    while pending:
        for inner in computations.get(pending.pop(), ()):
            pending += _called(inner)
            if inner.opcode == "constant" and inner.shape.startswith("s32[]"):
                constants.append(int(inner.arguments))
    return constants[0] if len(constants) == 1 else None


def _group(rest: str, devices: int) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):  # a ring: as far as it goes from its first device back to it
        after = {a: b for a, b in re.findall(r"(\d+),(\d+)", found[1]) if a != b}
        first = place = next(iter(after), "")
        length = 1
        while (place := after.get(place, first)) != first:
            length += 1
        return length
    return devices


def analyse(text: str, devices: int, largest: int = 8) -> Program:
    """Read a compiled program's text, that of one of `devices` devices."""
    computations, entry = parse(text)
    weights: Counter[str] = Counter()
    kernels_of: dict[str, bool] = defaultdict(bool)  # computations that stand alone, not inside a fusion
    unknown = 0
    turning: set[str] = set()  # computations inside loops of unknown length

    def visit(name: str, weight: int, alone: bool, turns: bool) -> None:
        nonlocal unknown
        weights[name] += weight
        kernels_of[name] |= alone
        if turns:
            turning.add(name)
        for instruction in computations.get(name, ()):
            times, endless = 1, False
            if instruction.opcode == "while":
                trips = _trips(instruction, computations)
                endless = trips is None
                unknown += endless
                times = trips or 1
            inner = alone and instruction.opcode in ("while", "conditional", "call")
            for called in _called(instruction):
                visit(called, weight * times, inner, turns or endless)

    visit(entry, 1, True, False)
    seen: dict[str, Collective] = {}
    buffers: dict[str, int] = {}
    kernels: Counter[str] = Counter()
    traffic = around = 0
    for name, weight in weights.items():
        shapes = {i.name: i.shape for i in computations[name]}
        inside = {i.name: i for i in computations[name]}
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", i.rest)
                put = sum(size(shapes.get(o, ""), False) for o in i.operands)
                got = size(i.shape, False) - (put if i.opcode.endswith("-start") else 0)
                if kind == "all-reduce" and any(word in name for word in ("all-reduce-scatter", "reduce_scatter")):
                    kind = "reduce-scatter"
                once = Collective(kind, max(put, got), _group(i.rest, devices), weight, i.source)
                # the parts of an overlapped collective stand in fusions and share its channel, as may what one shard_map asks for
                key = f"{name}/{i.name}" if kernels_of[name] or not channel else f"{channel[1]} {i.source} {once.bytes}"
                if key not in seen or seen[key].count < weight:
                    seen[key] = once
            if i.opcode == "custom-call" and (target := re.search(r'custom_call_target="([^"]+)"', i.rest)):
                kernels[target[1]] += weight
            if kernels_of[name] and i.opcode not in FREE:
                moved = weight * _traffic(i, inside, computations)
                if unknown and name not in turning:
                    around += moved
                else:
                    traffic += moved
                if i.opcode not in ("copy-start", "slice-start", "async-start"):
                    buffers[i.source] = max(buffers.get(i.source, 0), max((n for n, hbm in arrays(i.shape) if hbm), default=0))
    top = sorted(((n, source) for source, n in buffers.items() if n), reverse=True)[:largest]
    return Program(tuple(seen.values()), traffic, around, tuple(top), dict(kernels), unknown)


def _traffic(instruction: Instruction, inside: dict[str, Instruction], computations: dict[str, list[Instruction]]) -> int:
    """Bytes that one instruction reads from and writes to HBM. Of an operand that is only sliced, the slice; of one updated in
    place, the update, read and written."""
    begun = instruction.opcode.endswith("-start")
    total = 0 if begun else size(instruction.shape)
    for n, name in enumerate(instruction.operands):
        whole = size(inside[name].shape) if name in inside else 0
        if whole:
            touched, updated = _touched(instruction, n, whole, inside, computations)
            total += touched - (whole if updated else 0)
    return max(total, 0)


def _touched(
    user: Instruction, n: int, whole: int, inside: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> tuple[int, bool]:
    """Bytes that `user` reads of its operand n, and whether it updates that in place (then its result is not written as a whole)."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and n == 0:
        return min(whole, size(user.shape, False)), False
    if user.opcode == "dynamic-update-slice" and n == 0:
        update = inside.get(user.operands[1])
        return 2 * size(update.shape, False) if update else 0, True
    if user.opcode != "fusion":
        return whole, False
    body = computations[_called(user)[0]]
    mine = {i.name: i for i in body}
    names = {i.name for i in body if i.opcode == "parameter" and i.arguments == str(n)}
    total, updated = 0, False
    for i in body:
        if i.opcode == "bitcast" and names & set(i.operands):
            names.add(i.name)
            continue
        for place in (k for k, operand in enumerate(i.operands) if operand in names):
            touched, once = _touched(i, place, whole, mine, computations)
            total, updated = total + touched, updated or once
    return min(total, whole), updated
