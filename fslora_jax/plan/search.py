"""Whether a config's round fits a slice, the bounds on its time, and what to change where it does not fit."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fslora_jax.chips import Chip
from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.models import Model
from fslora_jax.plan.compiled import Compiled, compile_round
from fslora_jax.program import Collective


class Plan(NamedTuple):
    """One way to run the round; seconds are lower bounds: each part alone, at the chip's best rate."""

    chunks: int
    clients: int
    compiled: Compiled
    fits: bool | None
    compute_seconds: float | None
    memory_seconds: float | None
    link_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """The bound on a round: its longest part."""
        parts = [x for x in (self.compute_seconds, self.memory_seconds, self.link_seconds) if x is not None]
        return max(parts, default=None)

    @property
    def bytes(self) -> int:
        """Memory of one device: arguments, temporaries and outputs together."""
        return self.compiled.arguments + self.compiled.temporaries + self.compiled.outputs


def plan(config: Config, model: Model, shape: BatchShape, devices: Sequence[Any], chip: Chip | None) -> Plan:
    """Compiles the round of a config and holds it against the chip's data sheet; a CPU has none."""
    compiled = compile_round(config, model, shape, devices)
    found = Plan(config.federation.cohort_chunks, config.clients_per_round, compiled, None, None, None, None)
    if chip is None:
        return found
    return found._replace(
        fits=compiled.failure is None and found.bytes <= chip.memory,
        compute_seconds=compiled.flops / chip.flops,
        memory_seconds=compiled.read / chip.memory_rate,
        link_seconds=sum(moved(c, compiled.sizes) for c in compiled.exchanges) / chip.link_rate,
    )


def moved(exchange: Collective, sizes: dict[str, int]) -> float:
    """Bytes that each device at least sends in all executions of an exchange.

    >>> moved(Collective("all-reduce", ("clients",), bytes=80, times=3), {"clients": 4})
    360.0
    """
    members = 1
    for axis in exchange.axes:
        members *= sizes[axis]
    share = (members - 1) / members
    factor = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": members * share}.get(
        exchange.kind, 1
    )
    return exchange.bytes * exchange.times * factor


def plans(
    config: Config, model: Model, shape: BatchShape, devices: Sequence[Any], chip: Chip | None, tries: int
) -> Iterator[Plan]:
    """The plan of the config and, until one fits or ``tries`` are used up, of others that take less memory."""
    for number, one in enumerate(ways(config, len(devices))):
        if number > tries:
            return
        found = plan(one, model, shape, devices, chip)
        yield found
        if found.fits is not False:
            return


def ways(config: Config, devices: int) -> Iterator[Config]:
    """The config; then one client at a time; then weights and rows over ever more devices."""
    yield config
    f, mesh, fsdp = config.federation, config.mesh, config.mesh.fsdp
    while devices % (fsdp * mesh.tensor) == 0:
        slots = -(-config.clients_per_round // (devices // (fsdp * mesh.tensor)))
        if (slots, fsdp) != (f.cohort_chunks, mesh.fsdp):
            yield config.model_copy(
                update={
                    "federation": f.model_copy(update={"cohort_chunks": slots}),
                    "mesh": mesh.model_copy(update={"clients": -1, "fsdp": fsdp}),
                }
            )
        fsdp *= 2
