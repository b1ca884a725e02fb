"""What a method must know of the adapter: its modules, their ranks and scales, and what a client of rank k costs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fslora_jax.lora import Target


class Spec(NamedTuple):
    """What a method must know of the adapter.

    ``r`` is the global rank and ``scale`` the LoRA scale, save for modules that ``rank_pattern`` and ``scale_pattern``
    name by their path. ``share_sketch``: one draw for all modules of a rank, or each its own.
    """

    targets: Mapping[str, Target]
    r: int
    scale: float
    share_sketch: bool = False
    rank_pattern: Mapping[str, int] = {}
    scale_pattern: Mapping[str, float] = {}

    def ranks(self, k: Any = None) -> dict[str, Any]:
        """Rank of each module; of a client of rank ``k``, ``k / r`` of it, rounded, and at least 1.

        >>> Spec({"q": Target(4, 4, 2), "v": Target(4, 4, 2)}, r=8, scale=1.0, rank_pattern={"v": 2}).ranks(4)
        {'q': 4, 'v': 1}
        """
        full = {m: self.rank_pattern.get(m, self.r) for m in self.targets}
        return full if k is None else {m: part_of_rank(k, self.r, r) for m, r in full.items()}

    def scales(self) -> dict[str, float]:
        """LoRA scale of each module."""
        return {m: self.scale_pattern.get(m, self.scale) for m in self.targets}


def part_of_rank(k: Any, r: int, module_r: int) -> Any:
    """``max(1, round(k * module_r / r))`` in whole numbers, the same for a Python number and a traced one.

    >>> [part_of_rank(k, 8, 3) for k in (1, 4, 8)]
    [1, 2, 3]
    """
    rounded = (2 * k * module_r + r) // (2 * r)
    return rounded + (rounded == 0)


class Traffic(NamedTuple):
    """Bytes of each client in one round; whole numbers, or arrays over a cohort."""

    down: Any
    up: Any


def factor_values(spec: Spec, k: Any, factors: str = "ab") -> Any:
    """Values of ``k`` components of each module, of both factors or of one.

    >>> factor_values(Spec({"q": Target(10, 30, layers=2)}, r=8, scale=1.0), k=4, factors="b")
    240
    """
    ranks = spec.ranks(k)
    sizes = {m: t.layers * (t.i * ("a" in factors) + t.o * ("b" in factors)) for m, t in spec.targets.items()}
    return sum(ranks[m] * size for m, size in sizes.items())


def drawn_indices(spec: Spec, k: Any) -> Any:
    """How many indices say what was drawn: none at ``k = r``; modules of one rank share a draw if any do."""
    full, ranks = spec.ranks(), spec.ranks(k)
    drawn = {m: ranks[m] * (ranks[m] < full[m]) for m in full}
    if spec.share_sketch:
        return sum({full[m]: count for m, count in drawn.items()}.values())
    return sum(count * spec.targets[m].layers for m, count in drawn.items())


def traffic(spec: Spec, k: Any, head_values: int) -> Traffic:
    """What a client of rank ``k`` receives and sends in FSLoRA: its components of each module, the head, and downward
    the indices of what was drawn, 4 bytes each.

    >>> traffic(Spec({"q": Target(10, 10, layers=2)}, r=8, scale=1.0), k=4, head_values=5)
    Traffic(down=692, up=660)
    """
    up = 4 * (factor_values(spec, k) + head_values)
    return Traffic(down=up + 4 * drawn_indices(spec, k), up=up)
