"""Plans as a table and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fslora_jax.chips import GIB
from fslora_jax.plan.search import Plan, best


def as_dict(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan, of one device where nothing else is said."""
    c = plan.compiled
    return {
        "mesh": c.sizes,
        "cohort_chunks": plan.setting.chunks,
        "clients": plan.clients,
        "batch": c.shape and c.shape._asdict(),
        "slots_of_a_group": c.slots,
        "fits": plan.fits,
        "failure": c.failure,
        "bytes": {
            "arguments": c.arguments,
            "temporaries": c.temporaries,
            "outputs": c.outputs,
            "total": plan.bytes,
        },
        "matmul_flops": c.flops,
        "weight_bytes_read": c.read,
        "collectives": [
            {"kind": kind, "axes": list(axes), "bytes_a_round": size}
            for (kind, axes), size in by_kind(plan).items()
        ],
        "bound_seconds": {
            "compute": plan.compute_seconds,
            "memory": plan.memory_seconds,
            "links": plan.link_seconds,
            "round": plan.seconds,
        },
        "bound_clients_a_second": plan.clients / plan.seconds if plan.seconds else None,
        "compile_seconds": c.seconds,
    }


def by_kind(plan: Plan) -> Counter[tuple[str, tuple[str, ...]]]:
    """Bytes that each device has from its exchanges in a round, by kind and axes."""
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in plan.compiled.exchanges:
        found[c.kind, c.axes] += c.bytes * c.times
    return found


def print_plans(plans: Sequence[Plan], topology: str) -> None:
    """What each try takes, why some failed, the exchanges of the best one, and what to set."""
    console = Console()
    table = Table(title=f"one round on {topology}, for each device", title_justify="left")
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)  # narrow enough for 80 columns
    bounds = ("at least\ns", "at most\nclients/s")
    for name in ("mesh", "chunks", "inputs", "temp", "GiB", "fits", "TFLOP", *bounds):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(*row_of(plan))
    console.print(table)
    console.print("mesh: clients x fsdp x tensor; inputs, temporaries and all in GiB; TFLOP: matrix products")
    for plan in plans:
        if plan.compiled.failure:
            console.print(f"{name_of(plan)}: {plan.compiled.failure}", soft_wrap=True)
    shown = best(plans) or plans[-1]
    for (kind, axes), size in sorted(by_kind(shown).items()):
        console.print(f"{name_of(shown)}: {kind} over {' and '.join(axes)}: {size / 1e6:,.1f} MB a round")
    console.print(suggestion(plans), soft_wrap=True)


def row_of(plan: Plan) -> list[str]:
    """A try in the table; empty where nothing is known."""
    c = plan.compiled
    memory = [f"{x / GIB:.2f}" for x in (c.arguments, c.temporaries, plan.bytes)]
    bounds = [f"{plan.seconds:.3g}", digits(plan.clients / plan.seconds)] if plan.seconds else ["", ""]
    return [
        mesh_of(plan),
        str(plan.setting.chunks),
        *(["", "", ""] if c.failure else memory),
        {None: "", True: "yes", False: "no"}[plan.fits],
        digits(c.flops / 1e12) if c.flops else "",
        *bounds,
    ]


def digits(number: float) -> str:
    """At least three, and no exponent where it is large.

    >>> digits(6680.3), digits(2.0684)
    ('6,680', '2.07')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def mesh_of(plan: Plan) -> str:
    """Sizes of the mesh."""
    return "x".join(str(size) for size in plan.compiled.sizes.values())


def name_of(plan: Plan) -> str:
    """Which try it is, as the table has it."""
    return f"{mesh_of(plan)}, chunks {plan.setting.chunks}"


def suggestion(plans: Sequence[Plan]) -> str:
    """What to set, in one line."""
    chosen, own = best(plans), plans[0]
    if own.fits is None:
        return "suggested: the config's own settings; a CPU has no data sheet, so no others were tried"
    if chosen is None:
        return "no try fits: more chips, model.remat: full, a smaller batch, or --tries for more settings"
    if chosen is own:
        return "suggested: the config's own settings" + ", the best of those tried" * (len(plans) > 1)
    chunks, fsdp, tensor = chosen.setting
    more = f" --mesh.tensor {tensor}" if tensor != own.setting.tensor else ""
    return f"suggested: --federation.cohort-chunks {chunks} --mesh.fsdp {fsdp} --mesh.clients -1{more}"
