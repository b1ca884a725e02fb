"""Plans as a table and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fslora_jax.plan.search import Plan
from fslora_jax.plan.topology import GIB


def as_dict(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan, of one device where nothing else is said."""
    c = plan.compiled
    return {
        "mesh": c.sizes,
        "cohort_chunks": plan.chunks,
        "clients": plan.clients,
        "batch": c.shape._asdict(),
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
    """What each try takes, the exchanges of the last one, and what to change."""
    console = Console()
    table = Table(title=f"one round on {topology}, for each device", title_justify="left")
    for name in ("mesh", "chunks", "inputs", "temp", "GiB", "fits", "TFLOP", "s >=", "clients/s <="):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        c = plan.compiled
        sizes = "x".join(str(size) for size in c.sizes.values())
        memory = [f"{x / GIB:.2f}" for x in (c.arguments, c.temporaries, plan.bytes)]
        bound = [f"{plan.seconds:.3g}", f"{plan.clients / plan.seconds:.3g}"] if plan.seconds else ["", ""]
        fits = {None: "", True: "yes", False: "no"}[plan.fits]
        table.add_row(
            sizes,
            str(plan.chunks),
            *(["", "", ""] if c.failure else memory),
            fits,
            f"{c.flops / 1e12:.3g}",
            *bound,
        )
    console.print(table)
    console.print("mesh: clients x fsdp x tensor; inputs, temporaries and all in GiB; TFLOP: matrix products")
    last, first = plans[-1], plans[0]
    for (kind, axes), size in sorted(by_kind(last).items()):
        console.print(f"{kind} over {' and '.join(axes)}: {size / 1e6:,.1f} MB a round")
    for plan in plans:
        if plan.compiled.failure:
            console.print(f"chunks {plan.chunks}: {plan.compiled.failure}", soft_wrap=True)
    if last.fits and last is not first:
        settings = f"--federation.cohort-chunks {last.chunks} --mesh.fsdp {last.compiled.sizes['fsdp']}"
        console.print(f"it fits with {settings} --mesh.clients -1", soft_wrap=True)
    elif last.fits is False:
        console.print("no try fits; more chips, model.remat: full, a smaller batch, or --tries for more ways")
