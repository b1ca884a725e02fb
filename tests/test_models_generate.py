"""What decoders write, token for token as transformers with the same adapter writes it greedily, one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from contract import DECODERS, TOKENS, make_tier, make_tiny
from test_models_contract import K, with_peft

from fslora_jax import lora
from fslora_jax.models.generate import NOTHING

COUNT, WIDTH = 9, 12


def prompts():
    """The contract's texts, on the right of their rows, and an empty row."""
    tokens = np.zeros((1, len(TOKENS) + 1, WIDTH), np.int32)
    for row, text in enumerate(TOKENS):
        tokens[0, row, WIDTH - len(text) :] = text
    return jnp.asarray(tokens), jnp.array([[*map(len, TOKENS), 0]])


def torch_writes(hf, ends):
    """The model alone, without a cache: the most likely token, appended."""
    found = []
    for text in TOKENS:
        ids = torch.tensor(text)[None]
        for _ in range(COUNT):
            with torch.no_grad():
                token = hf(input_ids=ids, use_cache=False).logits[0, -1].argmax().item()
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if token in ends:
                break
        new = ids[0, len(text) :].tolist()
        found.append(new + [NOTHING] * (COUNT - len(new)))
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("family", DECODERS)
def test_it_writes_what_transformers_and_peft_write(family, tmp_path):
    tiny = make_tiny(family, "causal", tmp_path)
    tier = make_tier(tiny.model, {}, 1, K, lora.lora_scale(K, 6.0, use_rslora=True))
    wrapped, _, _ = with_peft(tiny, tier)
    free = torch_writes(wrapped, ends=())
    ends = (free[0][4], free[1][2])  # so that some rows end early, and all of them at different columns
    expected = torch_writes(wrapped, ends)
    write = jax.jit(tiny.model.generate, static_argnums=5)
    found = write(tiny.base, [tier], *prompts(), jnp.array(ends), COUNT)
    assert found[0].tolist() == [*expected, [NOTHING] * COUNT]
    assert len({tuple(row) for row in free}) > 1 and NOTHING in found[0, 0]
