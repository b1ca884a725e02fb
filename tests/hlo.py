"""Reads XLA's optimised programs: which arrays there are, which products meet frozen weights, what devices exchange."""

import re
from collections import Counter
from collections.abc import Iterator, Set
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]

ARRAY = re.compile(r"\b(?:f32|f16|bf16|f64)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective",
    "reduce-scatter",
    "ragged",
    "send",
    "recv",
)


class Product(NamedTuple):
    """A matrix product: shapes of the activations, of the kernel, and the kernel's contracted dimension."""

    rows: Shape
    kernel: Shape
    contracted: int


class Instruction(NamedTuple):
    name: str
    shapes: list[Shape]
    kind: str
    rest: str


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions, fused ones too."""
    for line in text.splitlines():
        found = INSTRUCTION.match(line)
        if found:
            name, result, kind, rest = found.groups()
            yield Instruction(name, shapes_in(result), kind, rest)


def shapes_in(text: str) -> list[Shape]:
    """The shapes of the floating-point arrays that a text names."""
    return [tuple(int(d) for d in dims.split(",") if d) for dims in ARRAY.findall(text)]


def dots(text: str) -> Iterator[tuple[Instruction, Shape, Shape]]:
    """Matrix products with the shapes of both operands."""
    known = {}
    for instruction in instructions(text):
        known[instruction.name] = instruction.shapes
        if instruction.kind == "dot":
            left, right = re.findall(r"%([\w.-]+)", instruction.rest)[:2]
            yield instruction, known[left][0], known[right][0]


def frozen_products(text: str, kernels: Set[Shape]) -> Counter[Product]:
    """How often each kind of product with an unstacked frozen kernel is in the program; kernels are on the right."""
    found = Counter()
    for instruction, left, right in dots(text):
        if right in kernels:
            (contracted,) = re.findall(r"rhs_contracting_dims=\{(\d+)\}", instruction.rest)
            found[Product(left, right, int(contracted))] += 1
    return found


def copies(text: str, kernels: Set[Shape], layers: int) -> set[Shape]:
    """Arrays that end like a kernel but are stacked over anything else than the layers."""
    either_way = set(kernels) | {k[::-1] for k in kernels}
    return {s for s in shapes_in(text) if s[-2:] in either_way and prod(s[:-2]) not in (1, layers)}


def kernel_gradients(text: str, kernels: Set[Shape]) -> list[str]:
    """Products whose result has the shape of a kernel."""
    either_way = set(kernels) | {k[::-1] for k in kernels}
    return [i.name for i, _, _ in dots(text) if tuple(d for d in i.shapes[0] if d > 1) in either_way]


def collectives(text: str) -> dict[str, int]:
    """Bytes that each kind of collective returns."""
    found: Counter[str] = Counter()
    for instruction in instructions(text):
        if instruction.kind.startswith(COLLECTIVES) and not instruction.kind.endswith("-done"):
            found[instruction.kind.removesuffix("-start")] += 4 * sum(prod(s) for s in instruction.shapes)
    return dict(found)
