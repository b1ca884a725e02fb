"""The mesh of devices, and which part of an array each of them holds.

Three axes: ``clients`` spreads the cohort, and the groups of devices along it meet once a round. The devices of one
group train the same clients: ``fsdp`` splits the rows of a batch and the frozen weights, which are gathered layer by
layer when they are used; ``tensor`` splits attention heads and features. Without a mesh nothing here does anything.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, PyTree

from fslora_jax.errors import UserError

CLIENTS, FSDP, TENSOR = AXES = ("clients", "fsdp", "tensor")

T = TypeVar("T")

INTO = (
    r"(query|key|value|[qkv]_proj|[qkv]_lin|attn\.[qkv]|Wqkv|intermediate\.dense|gate_proj|up_proj|lin1|Wi)"
)
"""Modules whose outputs are heads or hidden features: columns over ``tensor``."""

OUT_OF = r"(output\.dense|o_proj|out_lin|attn\.o|down_proj|lin2|Wo)"
"""Modules that lead back to the model's width: rows over ``tensor``, and their products are summed over it."""

KERNEL = r"kernel(/int8|/nf4|/absmax)?$"
"""A kernel, or a part of a packed one with the same dimensions."""

RULES: tuple[tuple[str, P], ...] = (
    (rf"{INTO}/{KERNEL}", P(FSDP, TENSOR)),
    (rf"{INTO}/bias$", P(TENSOR)),
    (rf"{OUT_OF}/{KERNEL}", P(TENSOR, FSDP)),
    (r"(embed_tokens|tok_embeddings)/embedding$", P(TENSOR, FSDP)),
    (r"word_embeddings/embedding$", P(None, FSDP)),
    (r"lm_head/kernel$", P(FSDP, TENSOR)),
    (r"(position_embeddings|token_type_embeddings|relative_attention_bias)/embedding$", P()),
    (r"(pooler|output)/(transform\.)?dense/kernel$", P()),
    (r"(bias|scale)$", P()),
)
"""How base weights are split, ``(pattern of the leaf's path, spec of its last dimensions)``; the first match counts."""

SMALL = 2**20
"""A leaf with fewer values may be held whole where no rule says anything."""


def make_mesh(clients: int, fsdp: int, tensor: int, devices: Sequence[Any]) -> Mesh | None:
    """A mesh over all ``devices``, None for a single one; ``clients = -1`` takes all that the others leave.

    Raises:
      UserError: the sizes do not make up the number of devices.
    """
    sizes, count = (clients, fsdp, tensor), len(devices)
    if clients == -1:
        sizes = (count // (fsdp * tensor), fsdp, tensor)
    if math.prod(sizes) != count:
        found = " x ".join(f"{name} {size}" for name, size in zip(AXES, (clients, fsdp, tensor), strict=True))
        raise UserError(
            f"mesh: found {found}, but there are {count} devices; "
            "expected sizes whose product is that, or clients: -1 for all that fsdp and tensor leave"
        )
    if count == 1:
        return None
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Every device holds the whole."""
    return None if mesh is None else NamedSharding(mesh, P())


def over_clients(mesh: Mesh | None, axis: int = 0) -> NamedSharding | None:
    """An axis, the leading one by default, is spread over the groups of devices."""
    return None if mesh is None else NamedSharding(mesh, P(*[None] * axis, CLIENTS))


def client_groups(mesh: Mesh | None) -> int:
    """How many groups of devices train different clients."""
    return 1 if mesh is None else mesh.shape[CLIENTS]


def manual_axes(mesh: Mesh) -> set[str]:
    """The axes over which a round itself says who does what: all, where the devices of a group have none to share.

    Else the others are the compiler's. Left to it needlessly, its partitioner looks through a whole round for a second.
    """
    return set(mesh.axis_names) if client_groups(mesh) == mesh.size else {CLIENTS}


def groups_here(mesh: Mesh) -> Bool[np.ndarray, " groups"]:
    """The groups that this process feeds; a group of several processes is fed by each of them."""
    here = np.array([device.process_index == jax.process_index() for device in mesh.devices.flat])
    return here.reshape(mesh.shape[CLIENTS], -1).max(1)


def base_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a leaf of the base lives; ``path`` is joined by slashes.

    Raises:
      UserError: no rule is known for a large leaf, or its rule does not fit its shape on this mesh.
    """
    return NamedSharding(mesh, base_spec(mesh.shape, path, shape))


def base_spec(sizes: dict[str, int], path: str, shape: tuple[int, ...]) -> P:
    """The spec of a leaf by `RULES`, on a mesh with axes of these sizes.

    >>> base_spec({"fsdp": 2, "tensor": 2}, "layers/linear/mlp.up_proj/kernel", (28, 3072, 8192))
    P(None, 'fsdp', 'tensor')
    """
    rule = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
    if rule is None:
        if math.prod(shape) >= SMALL and sizes[FSDP] * sizes[TENSOR] > 1:
            raise UserError(
                f"mesh: no rule splits {path} {list(shape)}; set mesh.fsdp and mesh.tensor to 1, "
                "or add its name to sharding.RULES"
            )
        return P()
    spec = P(*[None] * (len(shape) - len(rule)), *rule)
    for number, (axis, size) in enumerate(zip(spec, shape, strict=False)):
        if axis is not None and size % sizes[axis]:
            raise UserError(
                f"mesh.{axis}: found {sizes[axis]}, which does not divide dimension {number} of {path} "
                f"{list(shape)}; expected a divisor of {size}"
            )
    return spec


def base_shardings(mesh: Mesh | None, base: PyTree) -> PyTree:
    """Where the leaves of a base live; None for each without a mesh."""
    if mesh is None:
        return jax.tree.map(lambda _: None, base)
    return jax.tree.map_with_path(lambda path, x: base_sharding(mesh, leaf_name(path), x.shape), base)


def leaf_name(path: Any) -> str:
    """A path in a tree of dicts, joined by slashes."""
    return "/".join(str(entry.key) for entry in path)


def rows_split(x: Array) -> Array:
    """Activations ``(C, B, ...)`` with their rows over ``fsdp`` and everything else whole."""
    return jax.lax.with_sharding_constraint(x, P(None, FSDP)) if _splits(FSDP) else x


def outputs_split(path: str, y: Array) -> Array:
    """What the module at ``path`` puts out, ``(C, B, L, o)``: rows over ``fsdp``, features as its kernel's columns."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if not (_splits(FSDP) or _splits(TENSOR)):
        return y
    columns = base_spec(sizes, f"{path}/kernel", (sizes[FSDP] * sizes[TENSOR],) * 2)
    return jax.lax.with_sharding_constraint(y, P(None, FSDP, None, *_without_fsdp(columns)[-1:]))


def gathered(weights: T) -> T:
    """One layer's weights as its products take them: split over ``tensor`` alone."""
    if not _splits(FSDP):
        return weights
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def whole(path: Any, x: Array) -> Array:
        spec = base_spec(sizes, leaf_name(path), x.shape)
        return jax.lax.with_sharding_constraint(x, _without_fsdp(spec))

    return jax.tree.map_with_path(whole, weights)


def own_like(tree: T, like: Array) -> T:
    """Values as each group's own where ``like`` is: what a loop carries must be so from the start."""

    def varying(x: Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    def own(x: Array) -> Array:
        missing = tuple(varying(like) - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(own, tree)


def whole(tree: T) -> T:
    """Values that every device of a group shall hold."""
    if not (_splits(FSDP) or _splits(TENSOR)):
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), tree)


def _without_fsdp(spec: P) -> P:
    return P(*(None if axis == FSDP else axis for axis in spec))


def _splits(axis: str) -> bool:
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1) > 1
