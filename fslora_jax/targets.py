"""Which linear modules are adapted, and at which rank and alpha: names are matched as PEFT matches them."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fslora_jax.errors import UserError
from fslora_jax.lora import Target

V = TypeVar("V")

ALL_LINEAR = "all-linear"

DEFAULT_TARGETS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("qwen2", "qwen3"), ("q_proj", "v_proj")),
    # PEFT has no default for these; the same projections under their names, or what they are fused into.
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
    "modernbert": ("Wqkv",),
}
"""Hugging Face's ``model_type`` -> what is adapted where the config does not say, as in PEFT."""


def full_names(path: str, target: Target, layer_prefix: str) -> list[str]:
    """A module's names in the Hugging Face class, one for each layer."""
    return [layer_prefix.format(layer=layer) + path for layer in range(target.layers)]


def select_targets(
    field: str, modules: Mapping[str, Target], layer_prefix: str, target_modules: str | Iterable[str]
) -> dict[str, Target]:
    """The modules that ``target_modules`` names, sorted by path.

    Names are matched at the end of a module's path. A string is ``all-linear`` (every linear module of the layers,
    not the head), a name, or a regular expression of the whole path with the layer in it.

    Raises:
      UserError: a name matches no module, or only some layers of one.

    >>> modules = {"self.query": Target(4, 4, 2), "dense": Target(4, 4, 2)}
    >>> list(select_targets("lora.target_modules", modules, "layer.{layer}.", ["query"]))
    ['self.query']
    """
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            return dict(sorted(modules.items()))
        plain = re.fullmatch(r"[\w.-]+", target_modules)
        patterns = {target_modules: _ending(re.escape(target_modules)) if plain else target_modules}
    else:
        patterns = {name: _ending(re.escape(name)) for name in target_modules}
    chosen = set()
    for name, pattern in patterns.items():
        found = [m for m, target in modules.items() if _matches(field, m, target, layer_prefix, pattern)]
        if not found:
            raise UserError(
                f"{field}: {name!r} matches no module; expected the path of one of "
                f"{sorted(modules)}, or its ending, or a regular expression of a path such as "
                f"{layer_prefix.format(layer=0) + min(modules)}"
            )
        chosen |= set(found)
    return {m: modules[m] for m in sorted(chosen)}


def match_pattern(
    field: str, targets: Mapping[str, Target], layer_prefix: str, pattern: Mapping[str, V]
) -> dict[str, V]:
    """The values that PEFT's ``rank_pattern`` or ``alpha_pattern`` gives, by module path; the first match counts.

    A key is a regular expression of the end of a module's path. Modules that no key matches are left out.

    Raises:
      UserError: a key matches no adapted module, or not all layers of one: layers are stacked, so they share a rank.

    >>> targets = {"self.query": Target(4, 4, 2), "self.value": Target(4, 4, 2)}
    >>> match_pattern("lora.rank_pattern", targets, "layer.{layer}.", {"value": 4})
    {'self.value': 4}
    """
    values: dict[str, V] = {}
    for key, value in pattern.items():
        found = [m for m, target in targets.items() if _matches(field, m, target, layer_prefix, _ending(key))]
        if not found:
            raise UserError(
                f"{field}: {key!r} matches no adapted module; expected the end of one of {sorted(targets)}"
            )
        values = dict.fromkeys(found, value) | values
    return {m: values[m] for m in targets if m in values}


def exact_key(path: str, layer_prefix: str) -> str:
    """A pattern's key for one module in all layers, and for nothing else.

    >>> exact_key("output.dense", "bert.layer.{layer}.")
    'bert\\\\.layer\\\\.\\\\d+\\\\.output\\\\.dense'
    """
    return r"\d+".join(re.escape(part) for part in (layer_prefix + path).split("{layer}"))


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _matches(field: str, path: str, target: Target, layer_prefix: str, pattern: str) -> bool:
    """Whether a pattern takes a module, in all its layers."""
    try:
        taken = [bool(re.fullmatch(pattern, name)) for name in full_names(path, target, layer_prefix)]
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression ({error})") from None
    if any(taken) and not all(taken):
        raise UserError(
            f"{field}: takes {path} in layer {taken.index(True)}, but not in layer {taken.index(False)}; "
            "expected all layers of a module or none: layers are stacked, and share their rank"
        )
    return all(taken)
