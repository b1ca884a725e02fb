"""A run's exported adapter under the real transformers and peft: likelihoods of options, and greedy texts.

``python tests/answers.py RUN`` compares both with this package's own; RUN is a folder of
``fslora train configs/commonsense.yaml``.
"""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from smollm_against_torch import likelihoods

from fslora_jax.evaluate import gather, make_evaluation, option_accuracy
from fslora_jax.federation.examples import load_examples, tokenise_prompts
from fslora_jax.federation.results import load_round
from fslora_jax.federation.setup import global_model
from fslora_jax.generate import write_on
from fslora_jax.hub import resolve_model
from fslora_jax.methods import whole

NEW = 16


def main(run: Path) -> None:
    config, federation, server, _ = load_round(run, None)
    folder, task, spec = resolve_model(config.model.name), federation.task, federation.spec
    base, weights = global_model(federation, server)
    gguf = next(folder.glob("*.gguf"), None)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf and gguf.name).eval()
    before = likelihoods(hf, task.test)
    tuned = peft.PeftModel.from_pretrained(hf, run / "adapter").eval()

    score = make_evaluation(task.model.score, spec)(base, weights, task.test.batches)
    ours, theirs = gather(score, task.test.slots).loss, likelihoods(tuned, task.test)
    accuracies = [option_accuracy(loss, task.test.owner, task.test.right) for loss in (ours, theirs)]
    print(
        f"{len(ours)} options: largest difference of their log-likelihoods {np.abs(ours - theirs).max():.1e}; "
        f"the adapter itself changes them by up to {np.abs(theirs - before).max():.1f}; "
        f"accuracy here and in torch {accuracies}",
        flush=True,
    )
    examples = load_examples(config.data, config.seed, folder)[1]
    prompts, end = tokenise_prompts(folder, task.model, examples, config.data, NEW)
    written = write_on(task.model, base, whole(spec, weights), prompts, [end], NEW)
    expected = [greedy(tuned, prompt, end) for prompt in prompts]
    equal = sum(mine.tolist() == text for mine, text in zip(written, expected, strict=True))
    print(f"greedy texts: {equal} of {len(prompts)} equal, {sum(map(len, expected))} tokens")


def greedy(model, prompt: np.ndarray, end: int) -> list[int]:
    """What torch writes after a prompt, without the token that ends it."""
    ids = torch.tensor(prompt)[None].long()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": end}
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=end)
    return [token for token in out[0, ids.shape[1] :].tolist() if token != end]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
