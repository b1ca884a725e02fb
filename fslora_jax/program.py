"""What a compiled program does: the collectives of its text, the matrix products of its jaxpr, its memory."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.S | re.M)
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(.*$", re.M)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_AXIS = r"'(\w+)'(?::\((\d+)\)(\d+))?"
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4} | {
    f"{kind}{bits}": bits for kind in "sufc" for bits in (8, 16, 32, 64, 128)
}


class Memory(NamedTuple):
    """Bytes of a program on one device; temporaries with its code, outputs without what takes an argument's place."""

    arguments: int
    temporaries: int
    outputs: int


class Collective(NamedTuple):
    """One exchange: over which mesh axes, the bytes that each device has after it, how often a call runs it."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int


def memory_of(program: Any) -> Memory:
    """What the compiler says of a compiled program's memory."""
    found = program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes + found.generated_code_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
    )


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """The collectives of an optimised program for devices in a mesh of these ``sizes``.

    Loops count with their trips, and what a device exchanges with itself alone not at all. XLA spreads an exchange
    over several fusions, whose computations each hold a copy, and cuts one exchange of many arrays into several of
    the same channel: equal ones count as often as one computation has them.
    """
    bodies = dict(_COMPUTATION.findall(text))
    times = _executions(bodies, text)
    found: dict[tuple[str, str], list[Collective]] = {}
    for name, body in bodies.items():
        here: dict[tuple[str, str], list[Collective]] = {}
        for match in _COLLECTIVE.finditer(body):
            result, kind, start = match.groups()
            size = _bytes(result, bool(start) and kind != "all-reduce")
            channel = re.search(r"channel_id=(\d+)", match[0])
            key = channel[1] if channel else name, str(_ARRAY.findall(result))
            here.setdefault(key, []).append(Collective(kind, _axes(match[0], sizes), size, times[name]))
        for key, several in here.items():
            found[key] = max(found.get(key, []), several, key=len)
    return [one for several in found.values() for one in several if one.axes]


def _executions(bodies: Mapping[str, str], text: str) -> dict[str, int]:
    """How often each computation runs in one call of the program."""
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, body in bodies.items():
        for line in body.splitlines():
            trips = _trips(line, bodies) if " while(" in line else 1
            for group in _CALLED.findall(line):
                for called in re.findall(r"%([\w.-]+)", group):
                    callers[called].append((name, trips))
    times: dict[str, int] = {}

    def count(name: str) -> int:
        if name not in times:
            at_start = int(entry is not None and name == entry[1])
            times[name] = at_start + sum(trips * count(caller) for caller, trips in callers[name])
        return times[name]

    return {name: count(name) for name in bodies}


def _trips(line: str, bodies: Mapping[str, str]) -> int:
    """The trips of a loop that counts up by one, as every ``lax.scan`` does."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.-]+)", line)
    body = bodies[condition[1]] if condition else ""
    limit = re.search(r"ROOT .*compare\(.*?%([\w.-]+)\), direction=LT", body)
    constant = limit and re.search(rf"%{re.escape(limit[1])} = .*constant\((\d+)\)", body)
    return int(constant[1]) if constant else 1


def _bytes(result: str, with_operands: bool) -> int:
    """Bytes of a result type; of a started exchange only what arrives, which is the second half."""
    arrays = _ARRAY.findall(result)
    if with_operands:
        arrays = [array for array in arrays if array[1]]  # contexts are scalars
        arrays = arrays[len(arrays) // 2 :]
    return sum(_BITS[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in arrays) // 8


def _axes(line: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of a group differ."""
    groups = _groups(line, math.prod(sizes.values()))
    places = [np.unravel_index(np.array(group), tuple(sizes.values())) for group in groups]
    return tuple(
        axis for n, axis in enumerate(sizes) if any(len(set(place[n].tolist())) > 1 for place in places)
    )


def _groups(line: str, devices: int) -> list[list[int]]:
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    if mesh := re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}", line):
        axes, dims, order, grouped = mesh.groups()
        return _mesh_groups(axes, _iota(dims or str(devices), order), grouped)
    return [list(range(devices))]


def _mesh_groups(axes: str, ids: np.ndarray, grouped: str) -> list[list[int]]:
    """Groups over axes of a mesh that XLA made up, or over a part of one: ``'x':(2)4`` has 2 before it, 4 in it."""
    parts = {name: (before, part) for name, before, part in re.findall(_AXIS, grouped)}
    dims: list[int] = []
    for name, whole in re.findall(r"'(\w+)'=(\d+)", axes):
        before, part = parts.get(name, ("1", "1"))
        before, part = int(before or 1), int(part or whole)
        dims += [before, part, int(whole) // (before * part)]
    members = range(1, len(dims), 3)
    others = [d for d in range(len(dims)) if d not in members]
    return ids.reshape(dims).transpose([*others, *members]).reshape(-1, math.prod(dims[1::3])).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Device ids counted up in an array of these dimensions, which is then transposed."""
    shape = _numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) if order else None)


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products, loops with their trips; in a ``shard_map`` those of one shard.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda x, _: (x @ x, None)
    >>> matmul_flops(jax.make_jaxpr(lambda x: jax.lax.scan(step, x, length=5))(jnp.ones((2, 2))).jaxpr)
    80
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += trips * matmul_flops(inner)
    return total
