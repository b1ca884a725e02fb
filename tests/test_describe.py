"""``fslora describe``: sizes as transformers counts them, bytes as runs count them, memory near XLA's own figures."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import runs
import torch
import transformers
from test_bad_input import refusal

from fslora_jax import memory
from fslora_jax.describe import Describe, describe
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import ClientOptimizer
from fslora_jax.federation.round import Cohort, constants_of, make_round
from fslora_jax.lora import Target
from fslora_jax.methods import Client, Spec, fslora
from fslora_jax.models import build_model
from fslora_jax.types import Batch

MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
LLAMA_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
PAPERS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def in_transformers(model: Any) -> int:
    """Parameters of a model that has no memory."""
    return sum(value.numel() for value in model.parameters())


def test_sizes_are_those_of_transformers_and_of_the_paper():
    bert, llama = transformers.BertConfig(**MINILM), transformers.LlamaConfig(**LLAMA_3B)
    with torch.device("meta"):
        expected = (
            in_transformers(transformers.BertModel(bert, add_pooling_layer=False)),
            in_transformers(transformers.LlamaForCausalLM(llama)),
        )
    small = describe(bert.to_dict(), Describe("", pooling="mean"))
    large = describe(llama.to_dict(), Describe("", task="causal", target_modules=PAPERS, dtype="bfloat16"))
    assert (small["model"]["base_parameters"], large["model"]["base_parameters"]) == expected
    assert small["head_parameters"] == 384 * 2 + 2
    assert large["q_rank"] == 1_032_192
    assert large["adapter_parameters"] == 64 * 1_032_192
    assert [c["up"] for c in large["clients"]] == [4 * k * 1_032_192 for k in (8, 16, 32, 48, 64)]
    assert large["memory"]["weights"] == 2 * expected[1]


def test_bytes_are_those_that_a_run_counts(world, finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    capsys.readouterr()
    argv = ["--r", 8, "--ratios", 0.25, 0.5, "--target-modules", "query", "value", "--json"]
    runs.call(world, "describe", world.model, *argv)
    found = json.loads(capsys.readouterr().out)
    assert [(c["k"], c["down"], c["up"]) for c in found["clients"][:-1]] == [
        (tier["k"], tier["down_bytes"], tier["up_bytes"]) for tier in summary["tiers"]
    ]
    runs.call(world, "describe", world.model, *argv[:-1])
    table = capsys.readouterr().out
    assert f"{found['q_rank']:,}" in table and f"{found['memory']['total'] / 1e6:,.2f}" in table


def needed_by_xla(
    ranks: tuple[int, ...], batch_size: int, seq_length: int, remat: str
) -> tuple[int, memory.Memory]:
    """Bytes of a compiled round of MiniLM's shapes on one device, and the estimate."""
    config = transformers.BertConfig(**MINILM).to_dict()
    model = build_model(config, num_labels=2, pooling="mean", remat=remat)
    names = ("attention.self.query", "attention.self.value")
    spec = Spec({m: Target(384, 384, 6) for m in names}, 64, 1.0)
    method, size = fslora(spec, optax.sgd(1.0)), len(ranks)
    one_round = make_round(
        model.score,
        method,
        ClientOptimizer(optax.scale_by_adam(), lambda step: jnp.float32(0.1)),
        Layout(ranks),
        local_steps=2,
    )

    def arguments():
        key = jax.random.key(0)

        def numbers(*shape: int, dtype=jnp.int32):
            return jnp.zeros((1, 1, size, 2, *shape), dtype)

        rows = [numbers(batch_size, seq_length)] * 4
        examples = [numbers(batch_size), numbers(batch_size, dtype=jnp.float32), numbers(batch_size, 0)]
        clients = [jnp.zeros((1, 1, size), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
        server = method.init(key, model.init_head(key))
        return (
            model.init_base(key),
            server,
            constants_of(0),
            Cohort(Client(*clients), Batch(*rows, *examples)),
        )

    found = jax.jit(one_round).lower(*jax.eval_shape(arguments)).compile().memory_analysis()
    assert found is not None
    needed = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    plan = memory.Plan(ranks, batch_size, seq_length, states=2, heads=12, act_bytes=4, remat=remat)
    return needed, memory.estimate(model, spec, plan)


@pytest.mark.parametrize("remat", ["frozen", "full", "none"])
def test_memory_is_near_what_xla_needs(remat):
    needed, estimate = needed_by_xla((48, 32, 16, 8), 8, 64, remat)
    assert 0.75 < estimate.total / needed < 1.35, (estimate, needed)


def estimate_of(**changes: Any) -> dict[str, int]:
    return describe(transformers.BertConfig(**MINILM).to_dict(), Describe("", **changes))["memory"]


def test_memory_follows_the_cohort_and_the_mesh():
    whole = estimate_of()
    chunks, spread, split = estimate_of(cohort_chunks=5), estimate_of(devices=20), estimate_of(fsdp=4)
    assert chunks["activations"] == pytest.approx(whole["activations"] / 5, rel=1e-6)
    assert chunks["weights"] == spread["weights"] == whole["weights"]
    assert spread["optimizer"] < chunks["optimizer"] < whole["optimizer"]
    assert whole["weights"] / 4 < split["weights"] < whole["weights"] / 2
    assert estimate_of(optimizer="sgd")["optimizer"] == 0
    assert estimate_of(dtype="bfloat16")["weights"] == whole["weights"] / 2


def test_a_config_alone_is_enough(world, capsys, tmp_path):
    folder = tmp_path / "no weights"
    folder.mkdir()
    (folder / "config.json").write_bytes((world.model / "config.json").read_bytes())
    outputs = []
    for place in (folder, folder / "config.json"):
        capsys.readouterr()
        runs.call(world, "describe", place, "--json")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and list(Path(folder).iterdir()) == [folder / "config.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratios", "0", "0.5"], "ratios: found [0.0, 0.5], expected numbers above 0 and up to 1"),
        (["--r", "0"], "r: found 0, expected at least 1"),
        (["--clients", "0"], "clients: found 0, expected at least 1"),
        (["--target-modules", "q_proj"], "lora.target_modules: 'q_proj' matches no module"),
        (["--rank", "8"], "unknown argument --rank"),
        (["--seq-length", "21"], "seq_length: found 21, but the model takes at most 20 tokens"),
        (["--tensor", "3"], "mesh.tensor: found 3, which does not divide dimension"),
    ],
)
def test_what_cannot_be_described_is_refused(world, capsys, arguments, words):
    assert words in refusal(world, capsys, "describe", world.model, *arguments)
