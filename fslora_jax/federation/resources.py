"""What clients can afford: the rank k that each one holds, and how long a round takes it on a simulated clock."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from fslora_jax import memory
from fslora_jax.adapters.spec import model_spec
from fslora_jax.clients_config import DeviceConfig
from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.federation.method import make_method
from fslora_jax.methods import Client, Traffic
from fslora_jax.models import Model
from fslora_jax.random import Purpose, host_rng

STATES = {"sgd": 0, "adamw": 2}


class Clock(NamedTuple):
    """Simulated seconds of each client: of a byte that it receives or sends, and of one local step.

    ``traffic`` gives the bytes of a round, ``(round, ids, ranks) -> Traffic``; a client's may depend on the others.
    """

    traffic: Callable[..., Traffic]
    down: Float[np.ndarray, " clients"]
    up: Float[np.ndarray, " clients"]
    step: Float[np.ndarray, " clients"]

    def seconds(
        self,
        round: int,
        ids: Int[np.ndarray, " cohort"],
        ranks: Int[np.ndarray, " cohort"],
        steps: Int[np.ndarray, " cohort"],
    ) -> Float[np.ndarray, " cohort"]:
        """From the download to the report, of a whole cohort whose clients do so many local steps.

        >>> of_two = np.array([[0.125, 0.25], [0.25, 0.5], [0.5, 1.0]])
        >>> clock = Clock(lambda t, ids, ks: Traffic(8 * ks, 8 * ks), *of_two)
        >>> clock.seconds(0, np.array([1]), np.array([2]), np.array([3])).tolist()
        [15.0]
        """
        sent = self.traffic(round, ids, ranks)
        return sent.down * self.down[ids] + sent.up * self.up[ids] + self.step[ids] * steps


class Demand(NamedTuple):
    """What a client of rank k needs: bytes of memory, seconds of traffic and of a local step on a device.

    ``sent`` are the bytes of a round, as in `Clock`. Where they depend on the others, ``traffic`` is that of a cohort
    of rank k.
    """

    sent: Callable[..., Traffic]
    memory: Callable[[int], int]
    traffic: Callable[[DeviceConfig, int], float]
    step: Callable[[DeviceConfig, int], float]


def resources(
    config: Config, model: Model, tokens: float, squares: float
) -> tuple[Int[np.ndarray, " clients"], Clock | None]:
    """k of every client that trains, all or ``only_client``, and the simulated clock where the config has devices.

    ``tokens`` and ``squares`` are the means of an example's length and of its square.

    Raises:
      UserError: a device cannot hold or train even k = 1.
    """
    f = config.federation
    who = slice(None) if f.only_client is None else slice(f.only_client, f.only_client + 1)
    if not f.devices:
        return client_ranks(config)[who], None
    demand = demand_of(config, model, tokens, squares)
    names, kinds = device_kinds(config)
    devices = [f.devices[name] for name in names]
    if f.ranks == "device":
        ranks = np.array([largest_rank(config, name, demand) for name in names])[kinds]
    else:
        ranks = client_ranks(config)
    pairs, which = np.unique(np.stack([kinds, ranks]), axis=1, return_inverse=True)
    step = np.array([demand.step(devices[d], k) for d, k in pairs.T.tolist()])[which]
    of_a_byte = np.array([(8e-6 / device.down_mbps, 8e-6 / device.up_mbps) for device in devices])
    down, up = of_a_byte[kinds[who]].T
    return ranks[who], Clock(demand.sent, down, up, step[who])


def device_kinds(config: Config) -> tuple[list[str], Int[np.ndarray, " clients"]]:
    """The names of the config's devices, sorted, and which of them each client has, drawn by their shares."""
    devices = dict(sorted(config.federation.devices.items()))
    shares = np.array([device.share for device in devices.values()])
    rng = host_rng(config.seed, Purpose.RESOURCES, 1)
    return list(devices), rng.choice(len(shares), config.federation.num_clients, p=shares / shares.sum())


def demand_of(config: Config, model: Model, tokens: float, squares: float) -> Demand:
    """What a client of the config needs, as functions of its k."""
    f, spec = config.federation, model_spec(config.lora, model, config.federation.share_sketch)
    method = make_method(config, spec)
    head = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init_head, jax.random.key(0))))
    optimizer = config.client_optimizer
    plan = memory.Plan(
        ranks=(1,),
        batch_size=f.batch_size,
        seq_length=config.data.max_length,
        states=STATES[optimizer.name] or int(optimizer.momentum > 0),
        heads=model.heads,
        act_bytes=jax.numpy.dtype(config.model.dtype).itemsize,
        remat=config.model.remat,
    )

    @cache
    def bytes_of(k: int) -> int:
        found = memory.estimate(model, spec, plan._replace(ranks=(k,)))
        return found.total - found.server

    def sent(round: int, ids: np.ndarray, ranks: np.ndarray) -> Traffic:
        return method.traffic(round, Client._make((ids, ranks, np.ones(len(ids)), {})), head)

    def seconds_of_traffic(device: DeviceConfig, k: int) -> float:
        n = config.clients_per_round
        down, up = sent(0, np.arange(n), np.full(n, k))
        return 8e-6 * float(down[0] / device.down_mbps + up[0] / device.up_mbps)

    def seconds_of_step(device: DeviceConfig, k: int) -> float:
        values = memory.adapter_values(spec, k)
        flops = training_flops(model, values, f.batch_size * tokens, f.batch_size * squares)
        return float(flops) / (1e9 * device.gflops)

    return Demand(sent, bytes_of, seconds_of_traffic, seconds_of_step)


def largest_rank(config: Config, name: str, demand: Demand) -> int:
    """The largest k that fits the device's memory and, if there is one, the deadline of a round."""
    f, device = config.federation, config.federation.devices[name]

    def seconds(k: int) -> float:
        return demand.traffic(device, k) + f.local_steps * demand.step(device, k)

    def affordable(k: int) -> bool:
        return demand.memory(k) <= device.memory_gb * 1e9 and seconds(k) <= (f.round_deadline or np.inf)

    if not affordable(1):
        short = f"{demand.memory(1) / 1e9:.3g} GB, more than its memory_gb of {device.memory_gb:g}"
        if demand.memory(1) <= device.memory_gb * 1e9:
            short = f"{seconds(1):.3g} s a round, more than federation.round_deadline of {f.round_deadline:g}"
        raise UserError(
            f"federation.devices.{name}: k = 1 takes {short}; raise it, or lower federation.batch_size or local_steps"
        )
    low, high = 1, config.lora.r + 1  # affordable, and not or not there; both grow with k
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


def training_flops(model: Model, adapter_values: Any, tokens: Any, squares: Any) -> Any:
    """Operations of a forward and a backward pass, none of them done twice; numbers, or arrays over clients.

    A frozen matrix costs ``2 i o`` a token forward and as much backward (there is no gradient of a frozen weight), a
    trained value three times 2, attention three times ``4 d`` for each pair of an example's tokens (``squares``).
    """
    modules = model.modules.values()
    frozen = sum(2 * t.i * t.o * t.layers for t in modules)
    width, layers = next((t.i, t.layers) for t in modules)
    return (2 * frozen + 6 * adapter_values) * tokens + 12 * width * layers * squares


def client_ranks(config: Config) -> Int[np.ndarray, " clients"]:
    """k of every client, where it is not its device that says so."""
    f = config.federation
    ks = np.array([round(ratio * config.lora.r) for ratio in f.sketching_ratios])
    n = f.num_clients
    if f.ranks == "turn":
        return np.resize(ks, n)
    rng = host_rng(config.seed, Purpose.RESOURCES)
    if f.ranks == "random":
        return rng.choice(ks, n)
    return draw_ranks(f.ranks, n, *f.rank_range, rng)


def draw_ranks(
    name: str, n: int, least: int, largest: int, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Ranks as the paper's authors draw them: rounded and clipped to ``least`` to ``largest``.

    "uniform"; "normal" around the middle, with a sixth of the width; "heavy_tail", inverse log-normal samples
    stretched over the whole range, so that most clients have small ranks and few large ones.
    """
    if name == "uniform":
        samples = rng.uniform(least, largest, n)
    elif name == "normal":
        samples = rng.normal((least + largest) / 2, (largest - least) / 6, n)
    else:
        inverse = 1 / rng.lognormal(np.log((least + largest) / 4), 1.0, n)
        spread = max(np.ptp(inverse), np.finfo(float).tiny)
        samples = least + (inverse - inverse.min()) / spread * (largest - least)
    return np.round(np.clip(samples, least, largest)).astype(int)
