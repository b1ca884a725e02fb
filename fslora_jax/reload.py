"""PEFT adapter folders, read back strictly: what is not understood is refused, never passed over."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from fslora_jax.errors import UserError
from fslora_jax.export import CONFIG, LEAVES, ROOT, WEIGHTS
from fslora_jax.models.model import Model
from fslora_jax.types import Adapter, Head, Pair

LORA_KEY = re.compile(re.escape(ROOT) + r"(.+?\.)(\d+)\.(.+)\.lora_([AB])\.weight")
FLAX_LEAVES = {torch: flax for flax, torch in LEAVES.items()}
HEAD_KEY = re.compile(re.escape(ROOT) + r"(.+)\.(weight|bias)")

NEEDED = {"base_model_name_or_path": str, "task_type": str, "r": int, "lora_alpha": (int, float)}
PLAIN = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}
UNUSED = (
    *("alpha_pattern", "rank_pattern", "layers_to_transform", "layer_replication", "target_parameters"),
    *("fan_in_fan_out", "lora_bias", "use_dora", "use_qalora", "use_bdlora", "trainable_token_indices"),
)
"""Fields of PEFT's config that change what the tensors mean; only PEFT's default, nothing, is supported."""


class AdapterConfig(NamedTuple):
    """What an adapter folder says about its tensors; ``layer_prefix`` as in ``models.Naming``.

    ``label_names`` is empty where another program wrote the adapter.
    """

    base_model: str
    task_type: str
    r: int
    lora_alpha: float
    use_rslora: bool
    layer_prefix: str
    label_names: tuple[str, ...]


def read_adapter(folder: Path) -> tuple[Adapter, Head, AdapterConfig]:
    """The adapter and head of a folder that ``write_adapter`` or PEFT wrote, in float32.

    Raises:
      UserError: a file is missing or damaged, a tensor is unknown, missing or of a shape that does not fit,
        or the config asks for a variant of LoRA that is not supported.
    """
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors, metadata = _read_tensors(path)
    factors: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    prefixes, saved = set(), config["modules_to_save"] or ()
    head: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        if match := LORA_KEY.fullmatch(key):
            prefix, layer, module, factor = match.groups()
            prefixes.add(prefix + "{layer}.")
            factors.setdefault((module, factor), {})[int(layer)] = value if factor == "A" else value.T
        elif (match := HEAD_KEY.fullmatch(key)) and match[1].split(".")[0] in saved:
            head.setdefault(match[1], {})[FLAX_LEAVES[match[2]]] = value.T
        else:
            raise UserError(
                f"{path}: unknown tensor {key!r}; expected lora_A, lora_B, or one of {list(saved)}"
            )
    if len(prefixes) != 1:
        raise UserError(f"{path}: found layers under {sorted(prefixes)}; expected one stack of layers")
    said = AdapterConfig(
        base_model=config["base_model_name_or_path"],
        task_type=config["task_type"],
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=config["use_rslora"],
        layer_prefix=prefixes.pop(),
        label_names=tuple(json.loads(metadata.get("label_names", "[]"))),
    )
    return _stack(path, factors, said.r), head, said


def check_fits(adapter: Adapter, head: Head, config: AdapterConfig, model: Model) -> None:
    """Refuses an adapter that was made for another kind of model, or of head, than ``model``.

    Raises:
      UserError: names the first thing that differs, with both sides.
    """
    found: dict[str, Any] = {"task_type": config.task_type, "layers": config.layer_prefix}
    expected: dict[str, Any] = {"task_type": model.naming.task_type, "layers": model.naming.layer_prefix}
    for module, pair in adapter.items():
        target = model.modules.get(module)
        found[module] = (pair.a.shape, pair.b.shape)
        expected[module] = target and (
            (target.layers, config.r, target.i),
            (target.layers, config.r, target.o),
        )
    found["head"] = jax.tree.map(np.shape, head)
    expected["head"] = jax.tree.map(np.shape, jax.eval_shape(model.init_head, jax.random.key(0)))
    for name, value in found.items():
        if value != expected[name]:
            raise UserError(
                f"adapter of {config.base_model}: {name} is {value}, but the model has {expected[name]}; "
                "choose the model and the pooling that it was trained with"
            )


def _stack(path: Path, factors: dict[tuple[str, str], dict[int, np.ndarray]], r: int) -> Adapter:
    """The factors of all layers, after a check that each module has both, in every layer, of rank ``r``."""
    layers = range(1 + max(max(found) for found in factors.values()))
    adapter = {}
    for module in sorted({module for module, _ in factors}):
        pair = []
        for factor in "AB":
            found = factors.get((module, factor), {})
            if missing := sorted(set(layers) - set(found)):
                raise UserError(f"{path}: {module}.lora_{factor}.weight of layer {missing[0]} is missing")
            shapes = {found[n].shape for n in layers}
            if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != r for shape in shapes):
                raise UserError(
                    f"{path}: {module}.lora_{factor} has shapes {sorted(shapes)} with the rank first; "
                    f"expected one shape of rank {r}, as in {CONFIG}"
                )
            pair.append(np.stack([found[n] for n in layers]))
        adapter[module] = Pair(*pair)
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of ``adapter_config.json``, with PEFT's defaults for those that may be absent."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a PEFT adapter") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected an object of fields")
    for field, kind in NEEDED.items():
        if not isinstance(config.get(field), kind) or config[field] is True:
            raise UserError(f"{path}: {field} is {config.get(field)!r}; expected a {kind}")
    for field, choices in PLAIN.items():
        if config.get(field, choices[0]) not in choices:
            raise UserError(f"{path}: {field} is {config[field]!r}; only {choices} is supported")
    for field in UNUSED:
        if config.get(field):
            raise UserError(f"{path}: {field} is {config[field]!r}; only adapters without it are supported")
    return {"modules_to_save": None, "use_rslora": False} | config


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the adapter as safetensors, not pickled")
    try:
        # "flax" also reads bfloat16.
        with safe_open(path, framework="flax") as file:
            keys = file.keys()
            return {key: np.asarray(file.get_tensor(key), np.float32) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); export the adapter again") from error
