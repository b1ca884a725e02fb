"""EleutherAI's lm-eval harness on a language model of this package, with an adapter or without.

``python -m fslora_jax.harness --model fslora --model_args adapter=FOLDER --tasks ...`` is its ``lm_eval`` command with
this model; it needs ``pip install -e .[lm-eval]``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from fslora_jax import hub
from fslora_jax.adapters.read import check_fits, read_adapter
from fslora_jax.data.examples import Examples
from fslora_jax.data.held_out import hold_out
from fslora_jax.data.tokens import TokenStore, end_token, load_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.evaluate import gather, make_evaluation
from fslora_jax.generate import write_on
from fslora_jax.methods import Spec, whole
from fslora_jax.models import load_model
from fslora_jax.types import Trainable

STEP = 64
"""Lengths of rows are multiples of it, so that few programs serve all requests."""


@register_model("fslora")
class HarnessLM(TemplateLM):
    """A causal language model as the harness asks for it: log-likelihoods, rolling ones, greedy generation.

    Args:
      adapter: a PEFT adapter folder; its base is found as everywhere.
      model: a hub id or folder instead, for the plain model.
      dtype: of the base.
      max_gen_toks: the most tokens of a generation whose task says nothing else.
      harness: what the harness hands to every model, such as a batch size and a device; both are decided here.
    """

    def __init__(
        self,
        adapter: str | None = None,
        model: str | None = None,
        dtype: str = "float32",
        max_gen_toks: int = 256,
        **harness: Any,
    ):
        super().__init__()
        del harness
        if (adapter is None) == (model is None):
            raise UserError("model_args: expected either adapter=FOLDER or model=NAME")
        saved = read_adapter(Path(adapter)) if adapter else None
        if saved and saved.config.task_type != "CAUSAL_LM":
            raise UserError(f"{adapter}: found task_type {saved.config.task_type}; expected CAUSAL_LM")
        self._folder = hub.resolve_model(saved.config.base_model_name_or_path if saved else str(model))
        self._model, self._base = load_model(self._folder, task="causal", dtype=dtype)
        self._spec, self._weights = Spec({}, 1, 1.0), Trainable({}, {})
        if saved:
            check_fits(saved, self._model)
            self._spec, self._weights = saved.spec, Trainable(saved.adapter, {})
        self._tokens = load_tokenizer(self._folder)
        self._score = make_evaluation(self._model.score, self._spec)
        self._max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; also what an empty context is."""
        return end_token(self._folder, self._tokens)

    @property
    def max_length(self) -> int:
        """The most tokens that are predicted at once: the first one follows a token before."""
        return self._model.max_length - 1

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, by default without special tokens, as the harness has them for causal models."""
        return self._tokens.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation behind its context, and whether it is the greedy one; contexts lose their beginning."""
        if not requests:
            return []
        kept = [(context + answer)[-self.max_length - 1 :] for _, context, answer in requests]
        lengths = [len(ids) for ids in kept]
        learned = np.concatenate(
            [
                np.arange(n) >= max(n - len(answer), 1)
                for n, (_, _, answer) in zip(lengths, requests, strict=True)
            ]
        )
        tokens = np.concatenate(kept).astype(np.int32)
        store = TokenStore(
            tokens, np.append(0, np.cumsum(lengths)), np.zeros_like(learned, np.int8), learned.astype(np.int8)
        )
        everything = Examples(([],), np.zeros(len(kept), np.int32), ())
        row_length, own = -(-max(lengths) // STEP) * STEP, np.ones(len(kept), bool)
        held = hold_out(store, everything, np.arange(len(kept)), own, row_length, True)
        found = gather(self._score(self._base, self._weights, held.batches), held.slots)
        return list(zip((-found.loss).tolist(), (found.correct == found.count).tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once; those longer than the context in windows."""
        del disable_tqdm
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owner.append(number)
        found = [value for value, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owner, weights=found, minlength=len(requests)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts, up to the first of the strings in ``until``.

        Raises:
          UserError: the task asks for samples.
        """
        del disable_tqdm
        held, written = whole(self._spec, self._weights), [""] * len(requests)
        counts = [int(request.args[1].get("max_gen_toks", self._max_gen_toks)) for request in requests]
        for request in requests:
            if request.args[1].get("do_sample", False):
                raise UserError("generation: the task asks for samples; only greedy texts are written")
        for count in sorted(set(counts)):
            mine = [n for n, wanted in enumerate(counts) if wanted == count]
            prompts = [
                self.tok_encode(requests[n].args[0])[-(self._model.max_length - count) :]
                or [self.eot_token_id]
                for n in mine
            ]
            arrays = [np.array(ids, np.int32) for ids in prompts]
            texts = write_on(self._model, self._base, held, arrays, [self.eot_token_id], count)
            for n, ids in zip(mine, texts, strict=True):
                until = requests[n].args[1].get("until") or []
                text = self._tokens.decode(ids.tolist())
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                written[n] = text
        return written


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
