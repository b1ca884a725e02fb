"""Texts to token ids in one flat array: a data set takes the memory of its tokens, not of padding."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int8, Int32, Int64
from tokenizers import Encoding, Tokenizer

from fslora_jax.data.gguf import gguf_end, gguf_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.tensors import find_gguf

CHUNK = 4096
"""Examples tokenised at a time: an ``Encoding`` takes far more memory than the ids that are kept of it."""


class TokenStore(NamedTuple):
    """A ragged array: example ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``, and ``types`` likewise.

    ``learned`` is 1 on the tokens that a language model shall learn to predict, never on an example's first.
    ``truncated`` counts the examples that were too long.
    """

    tokens: Int32[np.ndarray, " total"]
    offsets: Int64[np.ndarray, " n+1"]
    types: Int8[np.ndarray, " total"]
    learned: Int8[np.ndarray, " total"]
    truncated: int = 0

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """The tokens of each example."""
        return np.diff(self.offsets)

    def lengths_of(self, examples: Int[np.ndarray, "*some"]) -> Int[np.ndarray, "*some"]:
        """The tokens of some examples."""
        return self.offsets[examples + 1] - self.offsets[examples]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model's folder, without truncation and padding that its file may ask for.

    Without a ``tokenizer.json`` it is that of the folder's ``.gguf`` file.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file() and (gguf := find_gguf(Path(folder))):
        return gguf_tokenizer(gguf)
    if not path.is_file():
        raise UserError(f"{path}: no such file; save the model's fast tokenizer there with save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a tokenizer ({reason}); save it anew with save_pretrained") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: tuple[list[str], ...], max_length: int, vocab_size: int
) -> TokenStore:
    """Tokenise texts, or pairs of texts, to at most ``max_length`` tokens, special tokens included.

    A pair too long loses tokens of its longer text first. ``vocab_size`` is the model's.
    """
    special = tokenizer.num_special_tokens_to_add(len(texts) == 2)
    if max_length <= special:
        raise UserError(f"max_length is {max_length}, but special tokens alone take {special}; choose more")
    inputs = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    tokenizer.enable_truncation(max_length)
    parts = [_flatten(encodings) for encodings in _encodings(tokenizer, inputs)]
    tokenizer.no_truncation()
    tokens, types, lengths, truncated = (np.concatenate(part) for part in zip(*parts, strict=True))
    _check(tokens, lengths, vocab_size)
    types = types if len(texts) == 2 else np.zeros_like(types)
    offsets = np.append(0, np.cumsum(lengths))
    return TokenStore(tokens, offsets, types, np.zeros_like(types), int(truncated.sum()))


def encode_prompts(
    tokenizer: Tokenizer,
    texts: tuple[list[str], list[str]],
    max_length: int,
    vocab_size: int,
    *,
    end: int | None,
    learn_all: bool = False,
) -> TokenStore:
    """Tokenise prompts with their completions, as one text each, to at most ``max_length`` tokens.

    Learned are the tokens of the completion, or all but the first with ``learn_all``. A text too long loses the
    beginning of its prompt (not a leading special token), and only then the end of its completion. ``end`` is
    the token that ends a text; None says that the texts hold all their special tokens themselves.
    """
    prompts, completions = texts
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    tokens, learned, truncated = [], [], 0
    encodings = chain.from_iterable(_encodings(tokenizer, whole, special=end is not None))
    for encoding, prompt in zip(encodings, prompts, strict=True):
        ids = np.array(encoding.ids, np.int32)
        mine = np.array([stop > len(prompt) for _, stop in encoding.offsets], np.int8)
        if end is not None:
            last = len(ids) - (len(ids) > 0 and ids[-1] == end)  # some tokenizers write the end themselves
            ids, mine = np.append(ids[:last], np.int32(end)), np.append(mine[:last], np.int8(1))
        kept = _window(mine, len(ids) - max_length, bool(sum(encoding.special_tokens_mask[:1])))
        truncated += len(kept) < len(ids)
        tokens.append(ids[kept])
        learned.append(np.ones_like(mine[kept]) if learn_all else mine[kept])
        learned[-1][:1] = 0
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    flat, flags = np.concatenate(tokens), np.concatenate(learned)
    _check(flat, lengths, vocab_size)
    return TokenStore(flat, np.append(0, np.cumsum(lengths)), np.zeros_like(flags), flags, truncated)


def end_token(folder: Path, tokenizer: Tokenizer) -> int:
    """The token that ends a text: ``eos_token`` of tokenizer_config.json, or ``eos_token_id`` of config.json.

    In a folder with a ``.gguf`` file alone, that file says so.
    """
    if not (Path(folder) / "config.json").is_file() and (gguf := find_gguf(Path(folder))):
        return gguf_end(gguf)
    said = [
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (Path(folder) / "tokenizer_config.json", Path(folder) / "config.json")
    ]
    name = said[0].get("eos_token")
    name = name["content"] if isinstance(name, dict) else name
    number = tokenizer.token_to_id(name) if name else said[1].get("eos_token_id")
    number = number[0] if isinstance(number, list) else number
    if not isinstance(number, int):
        raise UserError(
            f"{folder}: no end of text; expected eos_token in tokenizer_config.json, or eos_token_id in config.json"
        )
    return number


def _window(learned: Int8[np.ndarray, " n"], excess: int, bos: bool) -> Int[np.ndarray, " kept"]:
    """Which tokens are kept where ``excess`` are too many: the prompt loses its first, then the rest its last.

    >>> _window(np.array([0, 0, 0, 1, 1]), 1, True).tolist(), _window(np.array([0, 1, 1, 1]), 2, False).tolist()
    ([0, 2, 3, 4], [1, 2])
    """
    here, excess = np.arange(len(learned)), max(excess, 0)
    prompt = int(learned.argmax()) if learned.any() else 0
    dropped = min(excess, max(prompt - bos, 0))
    kept = np.delete(here, np.arange(bos, bos + dropped))
    return kept[: len(kept) - (excess - dropped)]


def _encodings(tokenizer: Tokenizer, inputs: list, special: bool = True) -> Iterator[list[Encoding]]:
    for i in range(0, len(inputs), CHUNK):
        yield tokenizer.encode_batch(inputs[i : i + CHUNK], add_special_tokens=special)


def _check(tokens: Int32[np.ndarray, " total"], lengths: Int64[np.ndarray, " n"], vocab_size: int) -> None:
    if tokens.max(initial=0) >= vocab_size:
        raise UserError(
            f"wrong tokenizer: it gives token {tokens.max()}, but the model's vocab_size is {vocab_size};"
            " use the model's own tokenizer.json"
        )
    if lengths.min() == 0:
        raise UserError(f"example {lengths.argmin()} has no tokens; remove the empty text from the data")


def _flatten(
    encodings: list[Encoding],
) -> tuple[
    Int32[np.ndarray, " total"], Int8[np.ndarray, " total"], Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]
]:
    tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32)
    types = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int8)
    lengths = np.array([len(e.ids) for e in encodings], np.int64)
    return tokens, types, lengths, np.array([len(e.overflowing) > 0 for e in encodings])
