"""PEFT's ``adapter_config.json``, typed: every field that changes the mathematics is understood, or refused."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError

from fslora_jax.config import LoraShape
from fslora_jax.errors import UserError
from fslora_jax.settings import Count, Fraction, Positive, one_line
from fslora_jax.tensors import read_object

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
ROOT = "base_model.model."
"""PEFT's names of the files of an adapter, and the beginning of its tensors' names."""

LEAVES = {"kernel": "weight", "bias": "bias"}
"""Our name of a leaf of the head -> torch's."""

UNSUPPORTED = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    *("megatron_config", "ensure_weight_tying", "revision"),
)
"""Fields that change what the tensors mean, or to what they belong; only PEFT's default, nothing, is understood."""

WITHOUT_INFLUENCE = (
    *("auto_mapping", "peft_version", "qalora_group_size", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Fields that say how the adapter was started, or what a variant that is not used would do."""


class AdapterConfig(LoraShape):
    """The fields of ``adapter_config.json`` in PEFT 0.18 to 0.21; the defaults are PEFT's."""

    model_config = ConfigDict(strict=True, coerce_numbers_to_str=False)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Annotated[str, Field(pattern="^(SEQ_CLS|TOKEN_CLS|CAUSAL_LM)$")]
    base_model_name_or_path: str
    r: Count = 8
    lora_alpha: Positive = 8
    use_rslora: bool = False
    lora_dropout: Fraction = 0.0
    bias: Literal["none"] = "none"
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...] | None = None
    inference_mode: bool = False

    init_lora_weights: bool | Literal["gaussian"] = True
    """PiSSA, OLoRA and their like change the base, so that their adapters do not fit the plain one."""

    def dump(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(mode="json", exclude={"init_lora_weights"}), indent=2) + "\n"


def read_config(path: Path) -> AdapterConfig:
    """The config of an adapter folder.

    Raises:
      UserError: no JSON, an unknown field, a value of another type, or a variant of LoRA that is not supported.
    """
    values = read_object(path, within="the folder of a PEFT adapter", mend="export the adapter again")
    for field in UNSUPPORTED:
        if value := values.get(field):
            raise UserError(f"{path}: {field} is {value!r}; only adapters without it are supported")
    understood = {k: v for k, v in values.items() if k not in UNSUPPORTED + WITHOUT_INFLUENCE}
    try:
        return AdapterConfig.model_validate_json(json.dumps(understood))
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error, AdapterConfig)}") from None
