"""The curves: what is varied, in which lines, and what is drawn of it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from fslora_jax.config import Config, make_config


class Point(NamedTuple):
    """One measurement: a config, and the virtual CPU devices and processes that it runs on, if not all that there is.

    ``fields`` replace some of the model's ``config.json``. Without ``runs`` the round is compiled from abstract arrays
    alone, and nothing is executed.
    """

    line: str
    x: int
    config: Config
    devices: int | None = None
    processes: int = 1
    fields: dict[str, Any] = {}
    runs: bool = True

    @property
    def name(self) -> str:
        """Of the line and the place on it."""
        return f"{self.line}, {self.x}"


class Curve(NamedTuple):
    """A family of points.

    Args:
      x: what is varied, for axes.
      values: of it, by default.
      points: ``(config, value) -> points``, one for each line that has the value.
      drawn: column of the record -> axis of a figure.
      flat: columns whose largest over smallest value is told, for each line.
      across: the column on the horizontal axis.
    """

    x: str
    values: tuple[int, ...]
    points: Callable[[Config, int], Sequence[Point]]
    drawn: dict[str, str]
    flat: tuple[str, ...] = ()
    across: str = "x"


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A config with some settings of its sections changed, and checked again."""
    values = config.model_dump(mode="json")
    for name, changes in sections.items():
        values[name] |= changes
    return make_config(values, "scale")


def of_clients(config: Config, clients: int, groups: int = 1) -> Config:
    """So many clients, all in each round, with as many at a time on each device as the config has on one."""
    at_once = max(1, config.clients_per_round // config.federation.cohort_chunks)
    chunks = max(1, -(-clients // (at_once * groups)))
    return changed(
        config, federation={"num_clients": clients, "clients_per_round": None, "cohort_chunks": chunks}
    )


def of_rank(config: Config, line: str, k: int, r: int, layout: str) -> Point:
    """All clients train k of r components."""
    federation = {"sketching_ratios": [k / r], "ranks": "turn", "layout": layout}
    return Point(line, k, changed(config, lora={"r": r}, federation=federation))


def by_rank(config: Config, k: int) -> list[Point]:
    """k up to r in both layouts; and r in proportion to k."""
    r = config.lora.r
    fixed = [of_rank(config, f"{layout}, r = {r}", k, r, layout) for layout in ("tiered", "masked") if k <= r]
    return [*fixed, of_rank(config, "tiered, r = 4 k", k, 4 * k, "tiered")]


def by_length(config: Config, length: int) -> list[Point]:
    """Rows of one text each."""
    return [
        Point("one text a row", length, changed(config, data={"max_length": length, "row_length": length}))
    ]


def by_devices(config: Config, devices: int) -> list[Point]:
    """The config's clients on more devices, and as many on each; also with the devices in two or four processes."""
    clients = config.clients_per_round
    spread = partial(changed, mesh={"clients": -1, "fsdp": 1, "tensor": 1, "cpu_devices": None})
    lines = {"strong": clients, "weak": clients * devices}
    alone = [Point(n, devices, spread(of_clients(config, c, devices)), devices) for n, c in lines.items()]
    return alone + [
        point._replace(line=f"{point.line}, {name} processes", processes=count)
        for name, count in {"two": 2, "four": 4}.items()
        if devices % count == 0
        for point in alone
    ]


def by_model(config: Config, width: int) -> list[Point]:
    """A layer for every 64 features, as in BERT; heads of 64, and four times as wide inside."""
    heads = max(1, width // 64)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 4 * width,
        "head_dim": width // heads,
    }
    return [Point("width / 64 layers", width, config, devices=1, fields=fields, runs=False)]


TIME = {"seconds": "seconds of a round"}
TEMPORARIES = {"temporaries": "bytes of temporaries, one device"}

CURVES = {
    "cohort": Curve(
        "clients in the round",
        (8, 32, 128, 512, 2048, 4096),
        lambda config, n: [Point("chunked", n, of_clients(config, n))],
        TIME
        | {"seconds_per_client": "seconds of a client", "peak_bytes": "most bytes of the process"}
        | TEMPORARIES,
        flat=("seconds_per_client", "peak_bytes", "temporaries"),
    ),
    "rank": Curve("k of each client", (4, 8, 16, 32, 64), by_rank, TIME | TEMPORARIES),
    "length": Curve("tokens of a text", (32, 64, 128, 256, 512), by_length, TIME | TEMPORARIES),
    "devices": Curve(
        "devices",
        (1, 2, 4, 8),
        by_devices,
        TIME | {"exchanged": "bytes that a device exchanges with other clients'"} | TEMPORARIES,
    ),
    "model": Curve(
        "values of the base",
        (128, 256, 512, 768, 1024, 2048),
        by_model,
        {"flops": "operations of a round's matrix products", "arguments": "bytes of arguments"} | TEMPORARIES,
        across="parameters",
    ),
}
"""Name -> curve."""
