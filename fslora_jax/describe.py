"""``fslora describe``: what a model, an adapter and a cohort would cost, from ``config.json`` alone."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fslora_jax import hub, memory
from fslora_jax.adapters.spec import model_spec
from fslora_jax.arguments import parse
from fslora_jax.config import LoraConfig
from fslora_jax.errors import UserError
from fslora_jax.lora import rank_unit
from fslora_jax.methods import Spec, traffic
from fslora_jax.models import Model, build_model
from fslora_jax.models.weights import open_folder
from fslora_jax.settings import checked
from fslora_jax.sharding import base_spec, leaf_name
from fslora_jax.tensors import read_object

STATES = {"sgd": 0, "momentum": 1, "adamw": 2}


@dataclasses.dataclass
class Describe:
    """Print what a model, its adapter and a cohort of clients cost: sizes, bytes on the wire, memory.

    Only config.json is read, no weights. Memory is an estimate from shapes, for full rows and the layout `tiered`. For
    BERT in float32 it came to 1.0 to 1.25 times what XLA's compiled rounds need, but a compiler may keep more: a CPU
    computes bfloat16 in float32, for instance. Leave a margin.
    """

    model: tyro.conf.Positional[str]
    """Hub id, model folder, or path of a config.json."""
    task: Literal["sequence", "causal"] = "sequence"
    """Classify examples, or predict next tokens."""
    pooling: Literal["native", "mean"] = "native"
    """How a classifier pools; see model.pooling of a config."""
    num_labels: int = 2
    """Labels of a classifier."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights and the activations."""
    remat: Literal["none", "frozen", "full"] = "frozen"
    """What the backward pass computes anew; see model.remat of a config."""
    r: int = 64
    """Rank of the server's adapter."""
    target_modules: str | tuple[str, ...] | None = None
    """As lora.target_modules of a config."""
    ratios: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    """Sketching ratios k / r, dealt to the cohort in turn."""
    clients: int = 20
    """Clients of a round's cohort."""
    batch_size: int = 16
    """Examples of a local step, each in a row of its own."""
    seq_length: int | None = None
    """Tokens of a row; by default 128, or the longest text of a model that takes less."""
    optimizer: Literal["sgd", "momentum", "adamw"] = "adamw"
    """Optimiser of the local steps."""
    cohort_chunks: int = 1
    """Parts in which each group of devices works through its clients."""
    devices: int = 1
    """Groups of devices that train different clients (mesh.clients)."""
    fsdp: int = 1
    """Devices of a group that split weights and rows (mesh.fsdp)."""
    tensor: int = 1
    """Devices of a group that split weights and features (mesh.tensor)."""
    json: bool = False
    """Print one JSON object, in bytes, instead of tables."""


def describe_command(argv: Sequence[str]) -> None:
    """Prints tables, or JSON."""
    args = parse(Describe, "fslora describe", Describe.__doc__ or "", argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    if not args.ratios or not all(0 < ratio <= 1 for ratio in args.ratios):
        raise UserError(f"ratios: found {list(args.ratios)}, expected numbers above 0 and up to 1")
    found = describe(read_config(args.model), args)
    print(json.dumps(found)) if args.json else print_description(found)


def read_config(name: str) -> Mapping[str, Any]:
    """The fields of a model's ``config.json``, or what a ``.gguf`` file says instead."""
    path = hub.resolve_config(name)
    return read_object(path) if path.is_file() else open_folder(path)[0]


def describe(config: Mapping[str, Any], args: Describe) -> dict[str, Any]:
    """All that the tables show, as plain numbers.

    Raises:
      UserError: the model takes no rows that long, or its weights cannot be split like that.
    """
    model = build_model(
        config,
        num_labels=args.num_labels,
        pooling=args.pooling,
        task=args.task,
        dtype=args.dtype,
        remat=args.remat,
    )
    if (args.seq_length or 1) > model.max_length:
        raise UserError(
            f"seq_length: found {args.seq_length}, but the model takes at most {model.max_length} tokens"
        )
    lora = checked(LoraConfig, {"r": args.r, "target_modules": args.target_modules}, "arguments")
    spec = model_spec(lora, model)
    base = jax.eval_shape(model.init_base, jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(base):
        base_spec({"fsdp": args.fsdp, "tensor": args.tensor}, leaf_name(path), leaf.shape)
    head = values_of(jax.eval_shape(model.init_head, jax.random.key(0)))
    ks = [max(1, round(ratio * args.r)) for ratio in args.ratios]
    return {
        "model": {
            "class": model.naming.architecture,
            "model_type": model.model_type,
            "layers": memory.layers_of(spec),
            "width": memory.width_of(model, base),
            "vocabulary": model.vocab_size,
            "longest_text": model.max_length,
            "base_parameters": values_of(base),
            "dtype": args.dtype,
        },
        "modules": {
            m: {"in": t.i, "out": t.o, "layers": t.layers, "q_rank": rank_unit({m: t})}
            for m, t in spec.targets.items()
        },
        "r": args.r,
        "q_rank": rank_unit(spec.targets),
        "adapter_parameters": memory.adapter_values(spec, args.r),
        "head_parameters": head,
        "clients": [
            {"ratio": ratio, "k": k, **traffic(spec, k, head)._asdict()}
            for ratio, k in [*zip(args.ratios, ks, strict=True), (1.0, args.r)]
        ],
        "mesh": {"clients": args.devices, "fsdp": args.fsdp, "tensor": args.tensor},
        "cohort": args.clients,
        "memory": cohort_memory(model, spec, ks, args),
    }


def cohort_memory(model: Model, spec: Spec, ks: Sequence[int], args: Describe) -> dict[str, int]:
    """Bytes on the device with the largest clients."""
    plan = memory.Plan(
        ranks=[ks[i % len(ks)] for i in range(args.clients)],
        batch_size=args.batch_size,
        seq_length=args.seq_length or min(128, model.max_length),
        states=STATES[args.optimizer],
        heads=model.heads,
        act_bytes=jax.numpy.dtype(args.dtype).itemsize,
        clients=args.devices,
        fsdp=args.fsdp,
        tensor=args.tensor,
        chunks=args.cohort_chunks,
        remat=args.remat,
    )
    parts = memory.estimate(model, spec, plan)
    return parts._asdict() | {"total": parts.total}


def values_of(tree: Any) -> int:
    """Numbers in all arrays, abstract or not."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def print_description(found: dict[str, Any]) -> None:
    """Four tables."""
    console, model = Console(), found["model"]
    print_table(console, "model", ("", ""), [(name.replace("_", " "), show(v)) for name, v in model.items()])
    modules = [
        (m, show(s["in"]), show(s["out"]), show(s["layers"]), show(s["q_rank"]))
        for m, s in found["modules"].items()
    ]
    modules.append(("all", "", "", "", show(found["q_rank"])))
    print_table(
        console, "adapted modules", ("module", "in", "out", "layers", "values per rank (q_rank)"), modules
    )
    console.print(
        f"adapter at rank {found['r']}: {show(found['adapter_parameters'])} values; "
        f"head, trained densely: {show(found['head_parameters'])}"
    )
    whole = found["clients"][-1]["up"]
    rows = [
        (f"{c['ratio']:g}", show(c["k"]), megabytes(c["down"]), megabytes(c["up"]), f"{c['up'] / whole:.1%}")
        for c in found["clients"]
    ]
    print_table(console, "MB of one client in one round", ("k / r", "k", "down", "up", "of full rank"), rows)
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    rows = [(part, megabytes(value)) for part, value in found["memory"].items()]
    print_table(console, f"MB on a device, roughly: {found['cohort']} clients, mesh {mesh}", ("", "MB"), rows)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, numbers to the right."""
    console.print(title, style="bold", soft_wrap=True)
    table = Table(show_header=any(columns))
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show(value: Any) -> str:
    """Numbers with separators.

    >>> show(1032192)
    '1,032,192'
    """
    return f"{value:,}" if isinstance(value, int) else str(value)


def megabytes(count: int) -> str:
    """Bytes as MB.

    >>> megabytes(2_500_000)
    '2.50'
    """
    return f"{count / 1e6:,.2f}"
