"""What a compiled program moves between devices, read from the text of its optimised HLO."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax

# The type of an element, and the lengths of the axes.
Buffer: TypeAlias = tuple[str, tuple[int, ...]]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# FLOPs of factorisations of n × n matrices, in n³, by a part of the name of the routine.
_CUBES = {"potrf": 1 / 3, "Cholesky": 1 / 3, "geqrf": 4 / 3, "orgqr": 4 / 3, "syevd": 9.0}
# What stands for other buffers, and moves nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "replica-id", "iota"}


class Collective(NamedTuple):
    """One collective operation of a program, as each device sees it.

    `times` is how often it runs; `counted` is False in a loop whose number of rounds the compiler
    does not know, of which one is counted. `source` is where in the traced function it is from.
    """

    kind: str
    results: tuple[Buffer, ...]
    group: int
    """How many devices take part together; for a permutation, are connected by it."""
    times: int
    counted: bool
    source: str

    @property
    def nbytes(self) -> float:
        """Bytes of the result on one device, of one run."""
        return math.fsum(map(_nbytes, self.results))

    @property
    def wire(self) -> float:
        """Bytes that a device sends in one run, if the devices form a ring."""
        others = self.group - 1
        if self.kind == "collective-permute":
            return self.nbytes
        if self.kind == "reduce-scatter":  # the result is one share of the buffer
            return others * self.nbytes
        return (2 if self.kind == "all-reduce" else 1) * others / self.group * self.nbytes


class Traffic(NamedTuple):
    """What one run of a compiled program does on each device.

    `flops` are those of matrix products, convolutions and factorisations, `precise` those among
    them at the highest precision, which narrow number formats do not speed up, and `accessed` the
    bytes read and written by each operation after fusion. All count the rounds of a loop, as
    `compiled.cost_analysis()` does not.
    """

    collectives: tuple[Collective, ...]
    flops: float
    precise: float
    accessed: float

    @property
    def counted(self) -> bool:
        """Whether the rounds of every loop with a collective in it are known."""
        return all(each.counted for each in self.collectives)

    def counts(self) -> dict[str, int]:
        """How many operations of each kind run."""
        return self._sum(lambda each: each.times)

    def nbytes(self) -> dict[str, float]:
        """For each kind the bytes of the results on one device."""
        return self._sum(lambda each: each.times * each.nbytes)

    def wire(self) -> float:
        """Bytes that a device sends in all, if the devices of an operation form a ring."""
        return math.fsum(each.times * each.wire for each in self.collectives)

    def _sum(self, number: Callable[[Collective], Any]) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for each in self.collectives:
            total[each.kind] = total.get(each.kind, 0) + number(each)
        return total


def traffic(program: str | jax.stages.Compiled) -> Traffic:
    """The collective operations, FLOPs and memory accesses of one run, on one device.

    **Arguments:**

    - `program`: what `jax.jit(f).lower(...).compile()` gives, or its `as_text()`.

    An operation in a loop counts as often as the loop runs where the compiler knows that, else
    once, with `counted=False`. Of the branches of a condition the one that sends most counts. An
    asynchronous pair of start and end is one operation.

    Two numbers tell how large an operation is. `nbytes` is its result on one device: for an
    all-gather the whole, for a reduce-scatter a share. `wire` is what a device sends where D of
    them form a ring: 2(D − 1)/D of the buffer for an all-reduce, all of it for a
    collective-permute, and (D − 1)/D of the whole buffer for the others.

    A compiler for the CPU has no sums of bfloat16: it moves these as float32.

    **Returns** a [`Traffic`][curvax.plan.Traffic]. **Raises** `ValueError` for another text.
    """
    module = _Module(program if isinstance(program, str) else program.as_text() or "")
    if not module.entry:
        raise ValueError(
            "program: got no entry computation, wanted the text of an HLO module, as "
            "jax.jit(f).lower(...).compile().as_text() gives it."
        )
    return module.traffic(module.entry, 1, True)


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for those applied to single numbers."""
        wanted = {"while": "condition|body", "call": "to_apply", "conditional": r"\w+_computation"}
        key = wanted.get(self.op, "calls")
        found = re.findall(rf"\b(?:{key})=%?([\w.\-]+)", self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return (*found, *(branches[1].replace("%", "").split(", ") if branches else ()))


class _Module:
    """The computations of a program, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        count = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(count[1]) if count else 1
        body: list[_Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                body = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
                body.append(_instruction(found[1], found[2]))

    def traffic(self, name: str, times: int, counted: bool, fused: bool = False) -> Traffic:
        """Of one computation and of what it calls."""
        shapes = {each.name: each.shape for each in self.computations[name]}
        collectives: list[Collective] = []
        flops = precise = accessed = 0.0
        for each in self.computations[name]:
            kind = each.op.removesuffix("-start")
            if kind in KINDS:
                collectives.append(self._collective(kind, each, times, counted))
            own = times * _flops(each, shapes)
            flops += own
            # Factorisations have no other.
            narrow = each.op in ("dot", "convolution") and "{highest," not in each.attributes
            precise += 0.0 if narrow else own
            if not fused and each.op not in _FREE and not each.op.endswith("-done"):
                accessed += times * self._accessed(each, shapes)
            # The computation that an asynchronous operation runs may be there, too.
            apart = kind in KINDS or each.op.endswith("-done")
            calls = () if apart else self._calls(each, times, counted, fused)
            inner = [self.traffic(*call) for call in calls]
            if each.op == "conditional":
                inner = [max(inner, key=lambda branch: (branch.wire(), branch.flops))]
            collectives += [found for part in inner for found in part.collectives]
            flops += sum(part.flops for part in inner)
            precise += sum(part.precise for part in inner)
            accessed += sum(part.accessed for part in inner)
        return Traffic(tuple(collectives), flops, precise, accessed)

    def _calls(
        self, each: _Instruction, times: int, counted: bool, fused: bool
    ) -> Iterator[tuple[str, int, bool, bool]]:
        """What an instruction runs, and how often."""
        if each.op == "while":
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.attributes)
            times, counted = times * (int(rounds[1]) if rounds else 1), counted and bool(rounds)
        for name in each.called:
            if name in self.computations:
                yield name, times, counted, fused or each.op == "fusion"

    def _collective(self, kind: str, each: _Instruction, times: int, counted: bool) -> Collective:
        parts = _split(each.shape[1:-1]) if each.shape.startswith("(") else [each.shape]
        if each.op.endswith("-start") and kind != "all-reduce":
            # The operands come first, then the results, then what the runtime needs.
            parts = [parts[1]]
        source = re.search(r'op_name="([^"]*)"', each.attributes)
        buffers = tuple(buffer for part in parts for buffer in _buffers(part))
        group = _group(each.attributes, self.devices)
        return Collective(kind, buffers, group, times, counted, source[1] if source else "")

    def _accessed(self, each: _Instruction, shapes: dict[str, str]) -> float:
        """Bytes that an operation reads and writes; of what it slices, the slice."""
        sizes = {name: _size(shapes[name]) for name in each.operands}
        result = _size(each.shape)
        if each.op in ("dynamic-slice", "slice", "gather"):
            return 2 * result
        if each.op == "dynamic-update-slice":
            return 2 * sizes[each.operands[1]]
        if each.op == "fusion" and (body := self.computations.get(each.called[0])):
            return _fused(body, result)
        return result + sum(sizes.values())


def _fused(body: list[_Instruction], result: float) -> float:
    shapes = {each.name: each.shape for each in body}
    total = result
    for each in body:
        if each.op == "parameter":
            users = [user for user in body if each.name in user.operands]
            whole = _size(each.shape)
            # One that is updated in a place is neither read nor written elsewhere.
            inside = [user for user in users if user.op == "dynamic-update-slice"]
            if inside and inside == users and users[0].operands[0] == each.name:
                update = _size(shapes[inside[0].operands[1]])
                total += 2 * update - min(whole, total)
            elif users and all(user.op in ("dynamic-slice", "gather") for user in users):
                total += sum(_size(user.shape) for user in users)
            else:
                total += whole
    return max(total, 0.0)


def _instruction(name: str, text: str) -> _Instruction:
    """`shape op(operands), attributes`; the shape of several buffers is in parentheses."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = start + _closing(rest[start:])
    names = tuple(re.findall(r"%([\w.\-]+)", rest[start:stop]))
    return _Instruction(name, shape, rest[:start], names, rest[stop + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis closes that the text begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    raise ValueError(f"program: an open parenthesis in {text[:80]!r}; wanted the text of an HLO.")


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _buffers(shape: str) -> list[Buffer]:
    """Every array in a shape."""
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", shape)
    return [(kind, tuple(int(n.strip("<=")) for n in dims.split(",") if n)) for kind, dims in found]


def _size(shape: str) -> float:
    """Bytes of all arrays in a shape."""
    return math.fsum(map(_nbytes, _buffers(shape)))


def _nbytes(buffer: Buffer) -> float:
    kind, dims = buffer
    bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])
    return math.prod(dims) * bits / 8


def _group(attributes: str, devices: int) -> int:
    """How many devices take part together, in each way that this is written down."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=@?\w*\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis is written with what comes before it, and its length.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _chain(re.findall(r"(\d+),(\d+)", found[1]))
    return devices


def _chain(pairs: list[tuple[str, str]]) -> int:
    """How many devices are in the largest set that such pairs connect."""
    sets: dict[str, set[str]] = {}
    for pair in pairs:
        joined = set(pair).union(*(sets.get(device, set()) for device in pair))
        sets |= dict.fromkeys(joined, joined)
    return max(map(len, sets.values()), default=1)


def _flops(each: _Instruction, shapes: dict[str, str]) -> float:
    size = lambda name: _buffers(shapes[name])[0][1]
    result = math.prod(dims[1]) if (dims := next(iter(_buffers(each.shape)), None)) else 0
    target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
    routine = target[1] if target else ""
    if each.op == "dot" or "gemm" in routine:
        form = r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]'
        found = re.search(form, each.attributes)
        axes = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
        return 2.0 * result * math.prod(size(each.operands[0])[axis] for axis in axes)
    if each.op == "convolution":
        window = re.search(r"window=\{size=([\dx]+)", each.attributes)
        labels = re.search(r"dim_labels=\w+_(\w+)->", each.attributes)
        taps = math.prod(map(int, window[1].split("x"))) if window else 1
        channels = size(each.operands[1])[labels[1].index("i")] if labels else 1
        return 2.0 * result * taps * channels
    if each.op == "triangular-solve" or "trsm" in routine:
        return float(result * size(each.operands[0])[-1])
    routine = "potrf" if each.op == "cholesky" else routine
    cube = next((number for part, number in _CUBES.items() if part in routine), 0.0)
    dims = size(each.operands[0]) if cube else (0,)
    return cube * math.prod(dims) * dims[-1]
