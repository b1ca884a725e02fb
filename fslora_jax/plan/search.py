"""Whether a config's round fits a slice, the bounds on its time, and which settings fit, or are faster."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fslora_jax.chips import Chip
from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.plan.apart import CompilerDied
from fslora_jax.plan.compiled import Compiled
from fslora_jax.program import Collective

NEARLY = 1.05
"""Times the best bound: as good."""


class Job(NamedTuple):
    """What all tries share: clients of a round, rows of a minibatch that go through the model at a time, heads of the
    model, and the slice; a CPU has no data sheet and so no ``chip``."""

    clients: int
    rows: int
    heads: int
    devices: int
    chip: Chip | None


class Setting(NamedTuple):
    """What the search changes: in how many parts a group trains its clients, and of which devices a group is."""

    chunks: int
    fsdp: int
    tensor: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a config."""
        mesh = {"clients": -1, "fsdp": self.fsdp, "tensor": self.tensor}
        return {"federation": {"cohort_chunks": self.chunks}, "mesh": mesh}

    def of(self, config: Config) -> Config:
        """The config with these settings."""
        sections = {
            name: getattr(config, name).model_copy(update=values) for name, values in self.settings.items()
        }
        return config.model_copy(update=sections)


class Plan(NamedTuple):
    """One way to run the round; seconds are lower bounds: each part alone, at the chip's best rate."""

    setting: Setting
    clients: int
    compiled: Compiled
    fits: bool | None = None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    link_seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """The bound on a round: its longest part."""
        parts = [x for x in (self.compute_seconds, self.memory_seconds, self.link_seconds) if x is not None]
        return max(parts, default=None)

    @property
    def bytes(self) -> int:
        """Memory of one device: arguments, temporaries and outputs together."""
        return self.compiled.arguments + self.compiled.temporaries + self.compiled.outputs

    @property
    def slots(self) -> int:
        """Clients of a group of devices, the most of all groups."""
        return -(-self.clients // self.compiled.sizes["clients"])

    @property
    def at_once(self) -> int:
        """Clients that a group of devices trains at a time."""
        return -(-self.slots // self.setting.chunks)


def plans(config: Config, job: Job, compiler: Callable[[Config], Compiled], tries: int) -> Iterator[Plan]:
    """The plan of the config, and of further settings, each chosen by what those before it took.

    Raises:
      UserError: the config's own settings do not go together.
    """
    setting = Setting(config.federation.cohort_chunks, config.mesh.fsdp, config.mesh.tensor)
    tried: list[Plan] = []
    while setting is not None and len(tried) < tries:
        try:
            compiled = compiler(setting.of(config) if tried else config)
        except UserError as error:
            if not tried and not isinstance(error, CompilerDied):
                raise
            groups = job.devices // (setting.fsdp * setting.tensor)
            sizes = {"clients": groups, "fsdp": setting.fsdp, "tensor": setting.tensor}
            compiled = Compiled(sizes, failure=str(error))
        tried.append(judged(Plan(setting, job.clients, compiled), job.chip))
        yield tried[-1]
        setting = next_setting(tried, job)


def judged(plan: Plan, chip: Chip | None) -> Plan:
    """A plan held against the chip's data sheet."""
    if chip is None:
        return plan
    compiled = plan.compiled
    return plan._replace(
        fits=compiled.failure is None and plan.bytes <= chip.memory,
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


def next_setting(tried: Sequence[Plan], job: Job) -> Setting | None:
    """What to try after all that was tried; None where nothing promises more.

    Clients at a time share what is read and gathered of the weights, so on a mesh as many as should fit; where not even
    one does, another mesh.
    """
    if job.chip is None:
        return None
    last = tried[-1]
    here = [plan for plan in tried if plan.compiled.sizes == last.compiled.sizes]
    enough = max((plan.at_once for plan in here if plan.fits), default=0)
    too_many = min((plan.at_once for plan in here if not plan.fits), default=last.slots + 1)
    if too_many == 1:
        return wider(last.setting, job)
    promising = max(1, min(most_at_once(here, job.chip.memory), too_many - 1))
    chunks = -(-last.slots // promising)
    more = -(-last.slots // chunks) > enough
    return last.setting._replace(chunks=chunks) if more else None


def most_at_once(here: Sequence[Plan], memory: int) -> int:
    """How many clients at a time should fit: their temporaries grow along a line.

    It goes through the two largest measured; through one alone and, for want of another, none for no clients.
    """
    measured = sorted((plan for plan in here if plan.bytes), key=lambda plan: plan.at_once)
    if not measured:
        return 1  # which measures something
    (less, below), (more, above) = [(0, 0), *((p.at_once, p.compiled.temporaries) for p in measured)][-2:]
    each, room = (above - below) / (more - less), memory - measured[-1].bytes
    return more + math.floor(room / each) if each > 0 else measured[-1].slots


def wider(setting: Setting, job: Job) -> Setting | None:
    """One client at a time in groups of twice the devices, which share out rows, or heads where rows are too few."""
    fsdp, tensor = setting.fsdp, setting.tensor
    if job.devices % (2 * fsdp * tensor):
        return None
    if 2 * fsdp <= job.rows:
        fsdp *= 2
    elif job.heads % (2 * tensor) == 0:
        tensor *= 2
    else:
        return None
    return Setting(-(-job.clients // (job.devices // (fsdp * tensor))), fsdp, tensor)


def best(tried: Sequence[Plan]) -> Plan | None:
    """Of the plans that fit, and whose bounds are the best or `NEARLY` so, the one of fewest chunks.

    A bound knows that a part has an empty slot, not that small products keep a chip less busy.
    """
    fitting = [plan for plan in tried if plan.fits]
    least = min((plan.seconds or 0.0 for plan in fitting), default=0.0)
    near = [plan for plan in fitting if (plan.seconds or 0.0) <= NEARLY * least]
    return min(near, key=lambda plan: plan.setting.chunks, default=None)
