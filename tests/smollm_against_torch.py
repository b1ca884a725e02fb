"""SmolLM2-135M's real weights against transformers: greedy texts of 20 prompts, and likelihoods of options.

``python tests/smollm_against_torch.py DATASET`` prints both; DATASET is the folder ``dataset`` of LLM-Adapters.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from fslora_jax.config import DataConfig
from fslora_jax.data.examples import take
from fslora_jax.evaluate import gather
from fslora_jax.federation.examples import find_examples, tokenise_held_out, tokenise_prompts
from fslora_jax.generate import write_on
from fslora_jax.hub import resolve_model
from fslora_jax.models import load_model
from fslora_jax.types import Local, Trainable

NUMBER, NEW = 20, 32
PLAIN = Local(Trainable({}, {}), {}, {}, {})


def main(dataset: str) -> None:
    folder = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    model, base = load_model(folder, task="causal")
    gguf = next(folder.glob("*.gguf"), None)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf and gguf.name).eval()
    data = DataConfig(task="commonsense", name=dataset, parts=("ARC-Easy", "boolq"), max_length=256)
    examples = find_examples(data, Path(folder), held_out=True)
    chosen = take(examples, np.linspace(0, len(examples.labels) - 1, NUMBER).astype(int))

    prompts, end = tokenise_prompts(folder, model, chosen, data, NEW)
    started = time.perf_counter()
    written = write_on(model, base, PLAIN, prompts, [end], NEW)
    seconds, equal, tokens = time.perf_counter() - started, 0, 0
    for mine, prompt in zip(written, prompts, strict=True):
        ids = torch.tensor(prompt)[None].long()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": end}
        with torch.no_grad():
            out = hf.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=end)
        theirs = [token for token in out[0, ids.shape[1] :].tolist() if token != end]
        equal, tokens = equal + (theirs == mine.tolist()), tokens + len(mine)
    print(f"greedy texts: {equal} of {NUMBER} equal, {tokens} tokens, {seconds:.1f} s with compilation")

    held = tokenise_held_out(folder, model, chosen, data)
    batches = jax.tree.map(lambda x: x[:, None], held.batches)
    score = jax.jit(model.score)
    parts = [
        score(base, [one(PLAIN)], jax.tree.map(lambda x, n=n: x[n], batches)) for n in range(len(held.slots))
    ]
    found = gather(jax.tree.map(lambda *x: np.concatenate(x), *parts), held.slots).loss
    expected = likelihoods(hf, held)
    print(
        f"{len(found)} options: largest difference of their log-likelihoods {np.abs(found - expected).max():.1e}"
    )


def one(held: Local) -> Local:
    return jax.tree.map(lambda x: x[None], held)


def likelihoods(hf, held) -> np.ndarray:
    """Minus the log-likelihood of each option's tokens, one row through torch at a time."""
    losses = np.zeros(len(held.owner))
    for batch, slots in enumerate(held.slots):
        tokens, segments, places = (
            getattr(held.batches, name)[batch] for name in ("tokens", "segments", "places")
        )
        for slot, row in enumerate(slots):
            if row < 0:
                continue
            b, columns = np.nonzero(segments == slot + 1)
            ids = torch.tensor(tokens[b[0], columns])[None].long()
            with torch.no_grad():
                logits = torch.log_softmax(hf(ids).logits[0], -1)
            asked = np.intersect1d(places[b[0]], columns) - columns[0]
            losses[row] = -sum(logits[n, ids[0, n + 1]].item() for n in asked)
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
