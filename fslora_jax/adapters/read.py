"""PEFT adapter folders, read strictly: what is not understood is refused, never passed over."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from fslora_jax.adapters.schema import CONFIG, LEAVES, ROOT, WEIGHTS, AdapterConfig, read_config
from fslora_jax.adapters.spec import make_spec
from fslora_jax.errors import UserError
from fslora_jax.lora import Target
from fslora_jax.methods import Spec
from fslora_jax.models import Model
from fslora_jax.types import Adapter, Head, Pair

PICKLED = "adapter_model.bin"
LORA_KEY = re.compile(re.escape(ROOT) + r"(.+?\.)(\d+)\.(.+)\.lora_([AB])\.weight")
HEAD_KEY = re.compile(re.escape(ROOT) + r"(.+)\.(weight|bias)")
FLAX_LEAVES = {torch: flax for flax, torch in LEAVES.items()}


class SavedAdapter(NamedTuple):
    """All that an adapter folder holds; ``layer_prefix`` as in ``models.Naming``.

    ``label_names`` is empty where another program wrote the adapter.
    """

    adapter: Adapter
    head: Head
    config: AdapterConfig
    spec: Spec
    layer_prefix: str
    label_names: tuple[str, ...]


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter and head of a folder that ``write_adapter`` or PEFT wrote, in float32.

    Raises:
      UserError: a file is missing or damaged, a tensor is unknown, missing or of a shape that does not fit,
        or the config asks for a variant of LoRA that is not supported.
    """
    config = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors, metadata = _read_tensors(path)
    factors: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    prefixes, saved = set(), tuple(config.modules_to_save or ())
    head: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        if match := LORA_KEY.fullmatch(key):
            prefix, layer, module, factor = match.groups()
            prefixes.add(prefix + "{layer}.")
            factors.setdefault((module, factor), {})[int(layer)] = value if factor == "A" else value.T
        # PEFT compares endings, too: its default "classifier" also saves DistilBERT's "pre_classifier".
        elif (match := HEAD_KEY.fullmatch(key)) and match[1].split(".")[0].endswith(saved):
            head.setdefault(match[1], {})[FLAX_LEAVES[match[2]]] = value.T
        else:
            raise UserError(
                f"{path}: unknown tensor {key!r}; expected lora_A, lora_B, or one of {list(saved)}"
            )
    if len(prefixes) != 1:
        raise UserError(f"{path}: found layers under {sorted(prefixes)}; expected one stack of layers")
    (layer_prefix,) = prefixes
    adapter = _stack(path, factors)
    spec = _check_ranks(folder, config, adapter, layer_prefix)
    return SavedAdapter(
        adapter, head, config, spec, layer_prefix, tuple(json.loads(metadata.get("label_names", "[]")))
    )


def check_fits(saved: SavedAdapter, model: Model) -> None:
    """Refuses an adapter that was made for another kind of model, or of head, than ``model``.

    Raises:
      UserError: names the first thing that differs, with both sides.
    """
    naming = model.naming
    found: dict[str, Any] = {"task_type": saved.config.task_type, "layers": saved.layer_prefix}
    expected: dict[str, Any] = {"task_type": naming.task_type, "layers": naming.layer_prefix}
    for module, target in saved.spec.targets.items():
        found[module], expected[module] = target, model.modules.get(module)
    found["head"] = jax.tree.map(np.shape, saved.head)
    expected["head"] = jax.tree.map(np.shape, jax.eval_shape(model.init_head, jax.random.key(0)))
    for name, value in found.items():
        if value != expected[name]:
            raise UserError(
                f"adapter of {saved.config.base_model_name_or_path}: {name} is {value}, but the model has "
                f"{expected[name]}; choose the model and the pooling that it was trained with"
            )


def _stack(path: Path, factors: dict[tuple[str, str], dict[int, np.ndarray]]) -> Adapter:
    """The factors of all layers, after a check that each module has both, in every layer, in one shape."""
    layers = range(1 + max(max(found) for found in factors.values()))
    adapter = {}
    for module in sorted({module for module, _ in factors}):
        pair = []
        for factor in "AB":
            found = factors.get((module, factor), {})
            if missing := sorted(set(layers) - set(found)):
                raise UserError(f"{path}: {module}.lora_{factor}.weight of layer {missing[0]} is missing")
            shapes = {found[n].shape for n in layers}
            if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
                raise UserError(
                    f"{path}: {module}.lora_{factor} has shapes {sorted(shapes)} with the rank first; "
                    "expected matrices of one shape in all layers"
                )
            pair.append(np.stack([found[n] for n in layers]))
        adapter[module] = Pair(*pair)
    return adapter


def _check_ranks(folder: Path, config: AdapterConfig, adapter: Adapter, layer_prefix: str) -> Spec:
    """Modules, ranks and scales as the config has them, if the tensors have the same."""
    modules = {m: Target(a.shape[2], b.shape[2], len(a)) for m, (a, b) in adapter.items()}
    spec = make_spec(str(folder / CONFIG), config, config.target_modules, modules, layer_prefix)
    if extra := sorted(set(modules) - set(spec.targets)):
        raise UserError(
            f"{folder / CONFIG}: target_modules does not take {extra[0]}, of which there are tensors"
        )
    for m, r in spec.ranks().items():
        ranks = tuple(factor.shape[1] for factor in adapter[m])
        if ranks != (r, r):
            raise UserError(
                f"{folder / WEIGHTS}: {m} has rank {ranks} in A and B; expected {r}, as in {CONFIG}"
            )
    return spec


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file() and path.with_name(PICKLED).is_file():
        raise UserError(
            f"{path.with_name(PICKLED)}: pickled, which can run code and is never read; convert it where you trust "
            "it: load it with peft's PeftModel.from_pretrained, then save_pretrained(FOLDER), which writes safetensors"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the adapter as safetensors")
    try:
        # "flax" also reads bfloat16.
        with safe_open(path, framework="flax") as file:
            keys = file.keys()
            return {key: np.asarray(file.get_tensor(key), np.float32) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); export the adapter again") from error
