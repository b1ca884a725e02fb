"""Settings of clients: who holds which examples, and what devices they have."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from fslora_jax.settings import Count, Fraction, Positive, Section


class PartitionConfig(Section):
    """Who holds which examples."""

    name: Literal["iid", "dirichlet", "shards", "quantity", "natural"] = "dirichlet"
    """`dirichlet` draws each label's shares over the clients from Dirichlet(dirichlet_alpha); `shards` deals
    pieces of the data sorted by label; `quantity` skews the sizes alone; `natural` has a client for each value of
    data.client_column."""
    by: Literal["label", "task"] = "label"
    """What `dirichlet` and `shards` divide: labels, or the tasks of data.parts."""
    dirichlet_alpha: Positive = 0.1
    """Of `dirichlet` and `quantity`; small values skew strongly."""
    shards_per_client: Count = 2
    """Of `shards`."""
    min_examples: Annotated[int, Field(ge=0)] = 1
    """No client holds fewer examples; `natural` leaves out those that do."""
    held_out: Fraction = 0.0
    """Part of each client's examples that it does not train on, rounded down, for `fslora eval RUN --per-client`."""


class DeviceConfig(Section):
    """A kind of device."""

    memory_gb: Positive
    """Memory for the model and its training, in 10^9 bytes."""
    gflops: Positive
    """Operations that training reaches, in 10^9 a second."""
    down_mbps: Positive
    """To the client, in 10^6 bits a second."""
    up_mbps: Positive
    """From the client, in 10^6 bits a second."""
    share: Positive = 1.0
    """How many clients have it, in proportion to the other kinds."""


def check_devices(devices: Mapping[str, DeviceConfig], ranks: str, deadline: float | None) -> None:
    """Refuses what needs devices where there are none.

    Raises:
      ValueError: names the setting.
    """
    if ranks == "device" and not devices:
        raise ValueError(
            "federation.ranks: device needs federation.devices; describe them, or choose another"
        )
    if deadline is not None and ranks != "device":
        raise ValueError(
            f"federation.round_deadline: found {deadline:g}, but only ranks: device gives clients the k that meets it; "
            "set federation.ranks to that, or leave it out"
        )


def check_asked(
    asked: int | None, wanted: int | None, clients: int, devices: Mapping[str, DeviceConfig]
) -> None:
    """Refuses to sample more than there are, or more than are wanted where no clock tells who is first.

    Raises:
      ValueError: names the setting.
    """
    if asked is None:
        return
    if wanted is None:
        raise ValueError(
            f"federation.clients_asked: found {asked} without federation.clients_per_round; set it to the number of "
            "reports that are waited for"
        )
    if not devices:
        raise ValueError(
            f"federation.clients_asked: found {asked} without federation.devices, whose clock tells who reports first; "
            "describe them"
        )
    if not wanted <= asked <= clients:
        raise ValueError(
            f"federation.clients_asked: found {asked}, expected {wanted} (clients_per_round) to {clients} (num_clients)"
        )


def check_ranks(ranks: str, rank_range: tuple[int, int], ratios: Sequence[float], r: int) -> None:
    """Refuses ranks outside 1 to r.

    Raises:
      ValueError: names the setting.
    """
    if not rank_range[0] <= rank_range[1]:
        raise ValueError(f"federation.rank_range: found {list(rank_range)}, expected [least, largest]")
    if ranks in ("uniform", "normal", "heavy_tail") and rank_range[1] > r:
        raise ValueError(
            f"federation.rank_range: k up to {rank_range[1]}, but lora.r is {r}; lower it or raise lora.r"
        )
    for ratio in ratios:
        if round(ratio * r) < 1:
            raise ValueError(
                f"federation.sketching_ratios: {ratio} of rank {r} rounds to k = 0, expected k >= 1; "
                f"use a ratio of at least {1 / r:.4g} or a larger lora.r"
            )
