"""The peer: PyTorch and PEFT, one client after another, as frameworks in torch simulate a federation.

Honest on purpose: one model in memory, adapters of each rank made once and refilled, fused attention, no data loader,
no evaluation, no dropout in the frozen base, and the same examples, ranks, weights, optimiser and averaging; a client
draws the same components in all modules. Where `model.products` is bfloat16, it runs under PyTorch's autocast, with
frozen kernels narrowed once and not in every step.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fslora_jax import hub
from fslora_jax.adapters.spec import adapter_config, client_config
from fslora_jax.adapters.write import named_tensors
from fslora_jax.bench.work import parts_of
from fslora_jax.config import Config
from fslora_jax.data.batches import FILLER
from fslora_jax.federation.setup import Federation, initial_server

Named = dict[str, Any]
"""Tensors of the global adapter and head, under the names of an exported adapter."""


def torch_engine(config: Config, federation: Federation, *, pad_to_max: bool) -> Callable[[], Named]:
    """Round 0 with PyTorch and PEFT; gives the averaged changes."""
    import torch

    parts, r = list(parts_of(federation)), federation.spec.r
    factors = [
        np.asarray(federation.optimizer.schedule(h)).item() for h in range(federation.feed.steps.local_steps)
    ]
    device = torch_device()
    model = wrapped_model(config, federation, device)
    weights = jax.device_get(initial_server(config, federation).weights)
    named = named_tensors(weights.adapter, weights.head, federation.task.model.naming)
    server = {name: torch.tensor(value, device=device) for name, value in named}
    width = config.data.max_length if pad_to_max else 0
    narrow = torch.autocast(device, torch.bfloat16, enabled=config.model.products == "bfloat16")

    def loss_of(batch: np.ndarray) -> Any:
        with narrow:
            return loss(model, federation, batch, width, device)

    def one_round() -> Named:
        torch.manual_seed(config.seed)
        totals = {name: torch.zeros_like(value) for name, value in server.items()}
        for k, weight, examples in parts:
            order = torch.randperm(r).to(device)
            model.set_adapter(f"rank_{k}")
            trained = {exported_name(name): p for name, p in model.named_parameters() if p.requires_grad}
            for name, p in trained.items():
                p.data.copy_(part(server[name], p, order))
            train_client(trained, config, factors, loss_of, examples)
            for name, p in trained.items():
                change = p.detach() - part(server[name], p, order)
                add(totals[name], weight * change, order)
        if device == "cuda":
            torch.cuda.synchronize()
        return totals

    return one_round


def torch_device() -> str:
    """The device that PyTorch computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def exported_name(name: str) -> str:
    """A parameter's name without PEFT's name of the adapter."""
    return re.sub(r"\.modules_to_save|\.rank_\d+", "", name)


def drawn(total: Any, own: Any, order: Any) -> list[tuple[int, Any]]:
    """The axis on which a client's tensor is smaller than the global one, and which components it has there."""
    return [
        (axis, order[order < n][:k])
        for axis, (n, k) in enumerate(zip(total.shape, own.shape, strict=True))
        if k < n
    ]


def part(total: Any, own: Any, order: Any) -> Any:
    """What a client gets of a global tensor: its rank components, or all of it."""
    for axis, index in drawn(total, own, order):
        total = total.index_select(axis, index)
    return total


def add(total: Any, change: Any, order: Any) -> None:
    """Adds a client's change where its components live."""
    for axis, index in drawn(total, change, order):
        total.index_add_(axis, index, change)
        return
    total += change


def wrapped_model(config: Config, federation: Federation, device: str) -> Any:
    """The base with one adapter for each rank in the cohort."""
    import peft
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    naming, task = federation.task.model.naming, federation.task
    folder = hub.resolve_model(config.model.name)
    dtype = getattr(torch, config.model.dtype)
    extra = {} if naming.task_type == "CAUSAL_LM" else {"num_labels": len(task.label_names)}
    base = getattr(transformers, naming.architecture).from_pretrained(folder, dtype=dtype, **extra)
    whole = adapter_config(config.lora, federation.spec, task.model, config.model.name)
    warnings.filterwarnings("ignore", category=FutureWarning)  # names in transformers that PEFT still uses
    model = None
    for k in sorted({part.k for part in parts_of(federation)}):
        said = client_config(whole, federation.spec, task.model, k)
        own = {"inference_mode": False, "lora_dropout": config.lora.lora_dropout}
        fields: dict[str, Any] = said.model_dump(mode="json") | own
        lora = peft.LoraConfig(**fields)
        if model is None:
            model = peft.get_peft_model(base, lora, adapter_name=f"rank_{k}")
        else:
            model.add_adapter(f"rank_{k}", lora)
    assert model is not None
    if config.model.products == "bfloat16":
        for name, module in model.named_modules():
            trained = re.search(r"lora_|modules_to_save", name)
            if isinstance(module, torch.nn.Linear) and not trained:
                module.to(torch.bfloat16)
    model.to(device).eval()
    for name, module in model.named_modules():
        if re.search(r"lora_dropout\.", name):
            module.train()
    return model


def train_client(
    trained: Named,
    config: Config,
    factors: Sequence[float],
    loss: Callable[[np.ndarray], Any],
    examples: np.ndarray,
) -> None:
    """The local steps of one client on ``examples`` (H, E), at learning rates times the schedule's ``factors``."""
    import torch

    c = config.client_optimizer
    lora = [p for name, p in trained.items() if "lora_" in name]
    head = [p for name, p in trained.items() if "lora_" not in name]
    peaks = (lora, c.learning_rate), (head, c.head_learning_rate or c.learning_rate)
    groups = [{"params": params, "lr": rate, "peak": rate} for params, rate in peaks if params]
    if c.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(c.b1, c.b2), eps=c.eps, weight_decay=c.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, momentum=c.momentum, weight_decay=c.weight_decay)
    for factor, batch in zip(factors, examples, strict=True):
        if (batch == FILLER).all():  # a step that the client does not do
            continue
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        if c.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), c.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.step()


def loss(model: Any, federation: Federation, examples: np.ndarray, width: int, device: str) -> Any:
    """Mean loss of a minibatch, padded to ``width`` or else to its longest example."""
    import torch

    population, naming = federation.task.population, federation.task.model.naming
    store = population.store
    width = max(width, int(store.lengths[examples].max()))
    tokens, mask, types = np.zeros((3, len(examples), width), np.int64)
    labels = np.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        cells = slice(store.offsets[example], store.offsets[example + 1])
        n = store.lengths[example]
        tokens[row, :n], types[row, :n], mask[row, :n] = store.tokens[cells], store.types[cells], 1
        labels[row, :n] = np.where(store.learned[cells] > 0, store.tokens[cells], -100)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if types.any():
        inputs["token_type_ids"] = types
    inputs = {name: torch.from_numpy(x).to(device) for name, x in inputs.items()}
    if naming.task_type == "CAUSAL_LM":
        return model(**inputs, labels=torch.from_numpy(labels).to(device)).loss
    logits = model(**inputs).logits
    if naming.task_type == "TOKEN_CLS":  # a linear head on the mean of the tokens
        weights = inputs["attention_mask"][..., None]
        logits = (logits * weights).sum(1) / weights.sum(1)
    target = torch.from_numpy(population.labels[examples].astype(np.int64)).to(device)
    return torch.nn.functional.cross_entropy(logits.float(), target)
