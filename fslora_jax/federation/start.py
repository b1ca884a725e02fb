"""What a run starts from: a fresh adapter or one from a folder, with a head that trains or one that is frozen."""

from pathlib import Path
from typing import Any

import jax

from fslora_jax.adapters.start import read_start
from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.methods import Method, Server, Spec
from fslora_jax.methods.parts import kernel_of
from fslora_jax.models import HEAD, Model, freeze_head
from fslora_jax.random import Purpose, device_key
from fslora_jax.types import Head, Trainable


def starting_point(
    config: Config, model: Model, spec: Spec, label_names: tuple[str, ...]
) -> tuple[Model, dict[str, Any], Trainable | None]:
    """The model as it is trained, what joins its base, and the weights to start from (``lora.init_from``), if any.

    Raises:
      UserError: the folder is not what the settings describe, or ``lora.modules_to_save`` is not the head.
    """
    start, folder = None, config.lora.init_from
    if folder is not None:
        start = read_start(Path(folder), spec, model, config.model.name, label_names)
    named, whole = config.lora.modules_to_save, model.naming.head_modules
    if named is None or (named and set(named) == set(whole)):
        return model, {}, start
    if named:
        raise UserError(
            f"lora.modules_to_save: found {list(named)}; expected {list(whole)}, the whole head of this model, or "
            "[] to freeze it: other modules are adapted (lora.target_modules) or frozen"
        )
    head = model.init_head(_init_keys(config)[1]) if start is None else start.head
    return freeze_head(model), {HEAD: head}, start and start._replace(head={})


def start_server(config: Config, method: Method, model: Model, spec: Spec, start: Trainable | None) -> Server:
    """The server before the first round; a method that draws fresh factors finds the ``start`` merged into the base."""
    adapter_key, head_key = _init_keys(config)
    server = method.init(adapter_key, model.init_head(head_key))
    if start is None:
        return server
    if not method.traits.moves_base:
        return server._replace(weights=start)
    scales = spec.scales()
    merged = {m: server.base_delta[m] + kernel_of(pair, scales[m]) for m, pair in start.adapter.items()}
    return server._replace(weights=server.weights._replace(head=start.head), base_delta=merged)


def whole_head(base: dict[str, Any], weights: Trainable) -> Head:
    """The head that goes with the adapter, trained or frozen."""
    return weights.head or base.get(HEAD, {})


def _init_keys(config: Config) -> jax.Array:
    return jax.random.split(device_key(config.seed, Purpose.INIT))
