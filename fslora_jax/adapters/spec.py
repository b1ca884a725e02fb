"""From the names of a config or of an adapter folder to a model's modules, ranks and scales."""

from fslora_jax.config import LoraShape
from fslora_jax.errors import UserError
from fslora_jax.lora import lora_scale
from fslora_jax.methods import Spec
from fslora_jax.models import Model
from fslora_jax.targets import DEFAULT_TARGETS, match_pattern, select_targets


def make_spec(lora: LoraShape, model: Model, share_sketch: bool = False) -> Spec:
    """The adapter that ``lora`` asks for in ``model``.

    Raises:
      UserError: a name matches no module, or not all layers of one.
    """
    prefix = model.naming.layer_prefix
    targets = select_targets(model.modules, prefix, _names(lora, model))
    ranks = match_pattern("lora.rank_pattern", targets, prefix, lora.rank_pattern)
    alphas = match_pattern("lora.alpha_pattern", targets, prefix, lora.alpha_pattern)
    return Spec(
        targets=targets,
        r=lora.r,
        scale=lora_scale(lora.r, lora.lora_alpha, lora.use_rslora),
        share_sketch=share_sketch,
        rank_pattern=ranks,
        scale_pattern={
            m: lora_scale(ranks.get(m, lora.r), alphas.get(m, lora.lora_alpha), lora.use_rslora)
            for m in targets
            if m in ranks | alphas
        },
    )


def _names(lora: LoraShape, model: Model) -> str | tuple[str, ...]:
    if lora.target_modules is not None:
        return lora.target_modules
    if model.model_type not in DEFAULT_TARGETS:
        raise UserError(
            f"lora.target_modules: {model.model_type} has no default; name some of {sorted(model.modules)}"
        )
    return DEFAULT_TARGETS[model.model_type]
