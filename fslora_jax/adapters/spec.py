"""From the names of a config or of an adapter folder to a model's modules, ranks and scales."""

from collections.abc import Mapping, Sequence

from fslora_jax.adapters.schema import AdapterConfig
from fslora_jax.config import LoraConfig, LoraShape
from fslora_jax.errors import UserError
from fslora_jax.lora import Target, lora_scale
from fslora_jax.methods import Spec
from fslora_jax.models import Model
from fslora_jax.targets import DEFAULT_TARGETS, exact_key, match_pattern, select_targets


def model_spec(lora: LoraConfig, model: Model, share_sketch: bool = False) -> Spec:
    """The adapter that a config asks for in ``model``; without names, what PEFT adapts in such a model.

    Raises:
      UserError: a name matches no module, or not all layers of one.
    """
    names = lora.target_modules or DEFAULT_TARGETS.get(model.model_type)
    if names is None:
        raise UserError(
            f"lora.target_modules: {model.model_type} has no default; name some of {sorted(model.modules)}"
        )
    spec = make_spec("lora", lora, names, model.modules, model.naming.layer_prefix)
    return spec._replace(share_sketch=share_sketch)


def make_spec(
    source: str, lora: LoraShape, names: str | Sequence[str], modules: Mapping[str, Target], layer_prefix: str
) -> Spec:
    """The adapter of the modules that ``names`` takes; ``source`` is where the settings come from."""
    targets = select_targets(f"{source}.target_modules", modules, layer_prefix, names)
    ranks = match_pattern(f"{source}.rank_pattern", targets, layer_prefix, lora.rank_pattern)
    alphas = match_pattern(f"{source}.alpha_pattern", targets, layer_prefix, lora.alpha_pattern)
    return Spec(
        targets=targets,
        r=lora.r,
        scale=lora_scale(lora.r, lora.lora_alpha, lora.use_rslora),
        rank_pattern=ranks,
        scale_pattern={
            m: lora_scale(ranks.get(m, lora.r), alphas.get(m, lora.lora_alpha), lora.use_rslora)
            for m in targets
            if m in ranks | alphas
        },
    )


def adapter_config(lora: LoraShape, spec: Spec, model: Model, base_model: str) -> AdapterConfig:
    """The config of the global adapter, with every module under a pattern of its own that nothing else matches."""
    prefix = model.naming.layer_prefix
    alphas = match_pattern("lora.alpha_pattern", spec.targets, prefix, lora.alpha_pattern)
    return AdapterConfig(
        task_type=model.naming.task_type,
        base_model_name_or_path=base_model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        target_modules=f"{exact_key('', prefix)}({'|'.join(exact_key(m, '') for m in spec.targets)})",
        rank_pattern={exact_key(m, prefix): r for m, r in spec.rank_pattern.items()},
        alpha_pattern={exact_key(m, prefix): alpha for m, alpha in alphas.items()},
        modules_to_save=model.naming.head_modules or None,
        inference_mode=True,
    )


def client_config(config: AdapterConfig, spec: Spec, model: Model, k: int) -> AdapterConfig:
    """The config of one client's adapter, whose modules have the ranks ``spec.ranks(k)``.

    The client computes at scale ``s r / k`` in each module, where s is the global scale. Plain LoRA of rank k scales
    by ``alpha / k``, so its alpha is ``s r``, whatever k is.
    """
    prefix, ranks, full, scales = model.naming.layer_prefix, spec.ranks(k), spec.ranks(), spec.scales()
    alphas = {m: scales[m] * full[m] for m in spec.targets}
    return config.model_copy(
        update={
            "r": k,
            "lora_alpha": spec.scale * spec.r,
            "use_rslora": False,
            "rank_pattern": {exact_key(m, prefix): r for m, r in ranks.items() if r != k},
            "alpha_pattern": {exact_key(m, prefix): a for m, a in alphas.items() if a != spec.scale * spec.r},
        }
    )
