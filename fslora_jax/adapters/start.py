"""A run that starts from an adapter folder: the folder must be what the settings describe."""

import math
from collections.abc import Sequence
from pathlib import Path

import yaml

from fslora_jax.adapters.read import SavedAdapter, check_fits, read_adapter
from fslora_jax.errors import UserError
from fslora_jax.methods import Spec
from fslora_jax.models import Model
from fslora_jax.types import Trainable

SHAPE = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
"""Settings that decide modules, ranks and scales; PEFT has them under the same names."""


def read_start(
    folder: Path, spec: Spec, model: Model, base_model: str, label_names: Sequence[str]
) -> Trainable:
    """The adapter and head of a PEFT folder, to go on from in a run with ``spec``.

    Raises:
      UserError: it is for another base, head or set of labels, or its modules, ranks and scales are not the run's.
    """
    saved = read_adapter(folder)
    said = saved.config.base_model_name_or_path
    if said != base_model:
        raise UserError(
            f"lora.init_from: {folder} adapts {said}, but model.name is {base_model}; choose that model, or, "
            "if both are the same, make base_model_name_or_path in its adapter_config.json equal to model.name"
        )
    check_fits(saved, model)
    _check_spec(folder, saved, spec)
    if saved.label_names and saved.label_names != tuple(label_names):
        raise UserError(
            f"lora.init_from: {folder} has the labels {list(saved.label_names)}, but the data has "
            f"{list(label_names)}; set data.label_names to the former, or choose another adapter"
        )
    return Trainable(saved.adapter, saved.head)


def _check_spec(folder: Path, saved: SavedAdapter, spec: Spec) -> None:
    """Ranks and scales are the settings' to say, so that a run's config tells what it trains."""
    found, expected = _shape(saved.spec), _shape(spec)
    for m in sorted(found.keys() | expected.keys()):
        (r, scale), (r_here, scale_here) = found.get(m, (0, 0.0)), expected.get(m, (0, 0.0))
        if r != r_here or not math.isclose(scale, scale_here, rel_tol=1e-6):
            said, set_here = (
                f"rank {k} and scale {s:g}" if k else "no adapter"
                for k, s in ((r, scale), (r_here, scale_here))
            )
            settings = saved.config.model_dump(mode="json", include=set(SHAPE))
            text = yaml.safe_dump(settings, default_flow_style=True, width=math.inf, sort_keys=False).strip()
            raise UserError(
                f"lora.init_from: {m} has {said} in {folder}, but {set_here} in the settings; set lora: {text}"
            )


def _shape(spec: Spec) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module."""
    scales = spec.scales()
    return {m: (r, scales[m]) for m, r in spec.ranks().items()}
