"""The typed configuration of a run: read from YAML, overridden on the command line, saved with the results."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from fslora_jax.clients_config import DeviceConfig, PartitionConfig, check_asked, check_devices, check_ranks
from fslora_jax.data_config import DataConfig
from fslora_jax.errors import UserError
from fslora_jax.optimizers_config import ClientOptimizerConfig, ServerOptimizerConfig
from fslora_jax.settings import Count, Fraction, Positive, Ratio, Section, checked


class ModelConfig(Section):
    """The frozen base model and its task head."""

    name: str
    """Local folder or Hugging Face id with config.json, tokenizer.json and safetensors, or with one .gguf file."""
    pooling: Literal["mean", "native"] = "native"
    """How an example becomes one vector: `native` is the family's own classification head, `mean` averages the
    tokens under a linear head (better for sentence-embedding models)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the base model and its activations; adapters and reductions stay float32."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of the frozen linear modules inside the layers: `int8` with a scale for each output, or `nf4`, 4 bits with a
    scale for every 64 inputs (QLoRA's format). They are restored layer by layer where they are used."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """`cudnn` is flash attention on a GPU in bfloat16; `auto` takes it where it can be had, else `xla`."""
    remat: Literal["none", "frozen", "full"] = "frozen"
    """What the backward pass computes anew to save memory: nothing, all of a layer but its products with frozen
    weights, or all of it. On a GPU `frozen` keeps as much as `none`. On a CPU `none` is fastest for up to 12 layers."""
    products: Literal["same", "bfloat16"] = "same"
    """Precision of a round's products with frozen kernels: that of `dtype`, or factors in bfloat16 and sums in
    float32, as a TPU multiplies by default; faster on a GPU, and on a CPU with AMX. Evaluation has that of `dtype`."""

    @model_validator(mode="after")
    def _narrow_from_float32(self):
        if self.products != "same" and (self.dtype != "float32" or self.quantization != "none"):
            raise ValueError(
                f"products: found {self.products} with dtype {self.dtype} and quantization {self.quantization}; "
                "it is for kernels in float32; set products: same"
            )
        return self


class LoraShape(Section):
    """Ranks and scales of the adapted modules; the names are PEFT's."""

    r: Count = 64
    """Rank of the server's adapter."""
    lora_alpha: Positive = 16.0
    """LoRA scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; always with the global r."""
    use_rslora: bool = True
    """Rank-stabilised scale (arXiv 2312.03732)."""
    rank_pattern: dict[str, Count] = {}
    """Other ranks than r for some modules, such as {output.dense: 8}; a name is the end of a path, or a regular
    expression of it. A client's ratio applies to each module's own rank."""
    alpha_pattern: dict[str, Positive] = {}
    """Other lora_alpha for some modules, named in the same way."""


class LoraConfig(LoraShape):
    """The global adapter; the names are PEFT's."""

    init_from: str | None = None
    """Folder of a PEFT adapter to start from; r, lora_alpha, modules and patterns must be those of the folder."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained densely: the whole head (by default), or none ([]), which freezes the head."""
    target_modules: str | tuple[str, ...] | None = None
    """Linear modules to adapt: names (a path or its ending), `all-linear` (all of the layers, not the head), or a
    regular expression of a module's whole path. By default what PEFT adapts in this family, such as query and value."""
    lora_dropout: Fraction = 0.0
    """Dropout on the input of the LoRA branch in training."""


class FederationConfig(Section):
    """Method, clients and rounds."""

    method: str = "fslora"
    """Federated method; `fslora methods` lists them."""
    method_options: dict[str, Any] = {}
    """Options of the method, such as {importance: true}; `fslora methods NAME` tells them."""
    wrappers: dict[str, dict[str, Any]] = {}
    """What is put around the method, with options, such as {personalise: {parts: [b, head]}}; in any order."""
    num_clients: Count = 20
    """Clients in the population."""
    clients_per_round: Count | None = None
    """Clients sampled each round; by default all."""
    only_client: Annotated[int, Field(ge=0)] | None = None
    """Trains this client alone, on its own share: what a client gains from the others is measured against it."""
    num_rounds: Count = 100
    """Rounds of the run."""
    rounds_per_call: Count = 1
    """Rounds in one dispatch, where no evaluation or checkpoint lies between; changes no result."""
    local_steps: Count = 10
    """Optimiser steps of each client in a round (H)."""
    min_local_steps: Count | None = None
    """Slow clients: each one of a cohort does between so many steps and `local_steps`, drawn anew in every round."""
    failure_rate: Fraction = 0.0
    """Part of the clients that fail in a round and contribute nothing; the average is over those that report."""
    batch_size: Count = 16
    """Examples of a local step."""
    rows_per_pass: Count | None = None
    """Packed rows of a client that go through the model at a time, their gradients added up, to save memory; passes
    that no client of a chunk needs are skipped, which saves time. By default all rows of a batch at once."""
    sketching_ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)] = (0.125, 0.25, 0.5, 0.75)
    """k / r, dealt to the clients in turn: client i gets the i-th, cyclically."""
    ranks: Literal["turn", "random", "uniform", "normal", "heavy_tail", "device"] = "turn"
    """How clients get their k: the sketching_ratios in turn or drawn at random, k from a distribution on
    rank_range (`heavy_tail` has many small ones), or the largest that the client's device can hold and train."""
    rank_range: tuple[Count, Count] = (1, 32)
    """Least and largest k of `uniform`, `normal` and `heavy_tail`."""
    devices: dict[str, DeviceConfig] = {}
    """Kinds of client devices by name, each with memory_gb, gflops, down_mbps, up_mbps and share. They give the run a
    simulated clock: a client computes by its operations, sends by its bytes, and the last report ends the round."""
    round_deadline: Positive | None = None
    """Simulated seconds in which ranks `device` lets a client finish a round, with a smaller k if need be."""
    clients_asked: Count | None = None
    """Over-selection: so many clients are sampled, and the first clients_per_round to report count."""
    share_sketch: bool = False
    """One draw for all adapted modules of a client, instead of one for each."""
    client_weights: Literal["uniform", "examples"] = "uniform"
    """Weights of the average: equal, or by the number of examples."""
    layout: Literal["tiered", "masked"] = "tiered"
    """`tiered` trains adapters of a low and a high rank, clients grouped by k; `masked` all at rank r. Same result."""
    cohort_chunks: Count = 1
    """Parts in which each device works through its clients, one after another, to save memory."""


MOST_CPU_DEVICES = 128
"""A CPU's; each holds the base model and has threads of its own, so with very many a machine gives up."""


class MeshConfig(Section):
    """How a run spreads over devices; the product of the three is their number. It changes no result."""

    clients: int = -1
    """Groups of devices that train different clients; -1 takes all devices that fsdp and tensor leave."""
    fsdp: Count = 1
    """Devices of a group that share out the base weights and the rows of a batch."""
    tensor: Count = 1
    """Devices of a group that share out attention heads and features."""
    cpu_devices: int | None = None
    """Devices that a CPU counts as, where it is what trains; each holds the base model. -1: one for each core that
    this process may use, but no more than clients of a round. By default JAX's own number, one."""

    @model_validator(mode="after")
    def _all_or_some(self) -> "MeshConfig":
        if self.clients != -1 and self.clients < 1:
            raise ValueError(f"clients: found {self.clients}, expected -1 (all that are left) or at least 1")
        if self.cpu_devices not in (None, -1) and not 1 <= self.cpu_devices <= MOST_CPU_DEVICES:
            raise ValueError(
                f"cpu_devices: found {self.cpu_devices}, expected -1 (one for each core) or 1 to {MOST_CPU_DEVICES}"
            )
        return self


class Config(Section):
    """A federated run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    partition: PartitionConfig = PartitionConfig()
    federation: FederationConfig = FederationConfig()
    mesh: MeshConfig = MeshConfig()
    client_optimizer: ClientOptimizerConfig = ClientOptimizerConfig()
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds every random purpose: initial weights, split, partition, cohorts, sketches, batches, dropout."""
    evaluate_every: Count = 10
    """Rounds between evaluations; the first and the last state are always evaluated."""
    checkpoint_every: Count = 10
    """Rounds between checkpoints; the last is always saved."""
    keep_checkpoints: Count = 2
    """Newest checkpoints to keep."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further loggers; metrics.jsonl is always written."""

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        f, r = self.federation, self.lora.r
        if f.clients_per_round is not None and f.clients_per_round > f.num_clients:
            raise ValueError(
                f"federation.clients_per_round: found {f.clients_per_round}, expected at most "
                f"federation.num_clients = {f.num_clients}"
            )
        if f.only_client is not None and f.only_client >= f.num_clients:
            raise ValueError(
                f"federation.only_client: found {f.only_client}, expected one of 0 to {f.num_clients - 1}"
            )
        check_devices(f.devices, f.ranks, f.round_deadline)
        check_asked(f.clients_asked, f.clients_per_round, self.population, f.devices)
        if f.min_local_steps is not None and f.min_local_steps > f.local_steps:
            raise ValueError(
                f"federation.min_local_steps: found {f.min_local_steps}, expected at most "
                f"federation.local_steps = {f.local_steps}"
            )
        if f.rows_per_pass is not None and f.rows_per_pass % self.mesh.fsdp:
            raise ValueError(
                f"federation.rows_per_pass: found {f.rows_per_pass}, expected a multiple of mesh.fsdp = "
                f"{self.mesh.fsdp}, whose devices share out the rows"
            )
        check_ranks(f.ranks, f.rank_range, f.sketching_ratios, r)
        if self.data.row_length is not None and self.data.row_length < self.data.max_length:
            raise ValueError(
                f"data.row_length: found {self.data.row_length}, expected at least data.max_length = "
                f"{self.data.max_length}, since an example stays within one row"
            )
        return self

    @property
    def population(self) -> int:
        """Number of clients that train."""
        return self.federation.num_clients if self.federation.only_client is None else 1

    @property
    def clients_per_round(self) -> int:
        """Size of the cohort: those that are asked."""
        f = self.federation
        return min(f.clients_asked or f.clients_per_round or self.population, self.population)


def make_config(values: Any, source: str) -> Config:
    """A config from nested values, checked."""
    return checked(Config, values, source)


def load_config(path: Path) -> Config:
    """Reads a YAML config."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected a YAML config") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; expected a YAML config") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    return make_config(values, str(path))


def dump_config(config: Config) -> str:
    """The resolved config as YAML; ``load_config`` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
