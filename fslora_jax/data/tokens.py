"""Texts to token ids in one flat array: a data set takes the memory of its tokens, not of padding."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int8, Int32, Int64
from tokenizers import Encoding, Tokenizer

from fslora_jax.data.gguf import gguf_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.tensors import find_gguf

CHUNK = 4096
"""Examples tokenised at a time: an ``Encoding`` takes far more memory than the ids that are kept of it."""


class TokenStore(NamedTuple):
    """A ragged array: example ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``, and ``types`` likewise.

    ``learned`` is 1 on the tokens that a language model shall learn to predict, never on an example's first.
    """

    tokens: Int32[np.ndarray, " total"]
    offsets: Int64[np.ndarray, " n+1"]
    types: Int8[np.ndarray, " total"]
    learned: Int8[np.ndarray, " total"]

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """The tokens of each example."""
        return np.diff(self.offsets)


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
    parts = [_flatten(tokenizer.encode_batch(inputs[i : i + CHUNK])) for i in range(0, len(inputs), CHUNK)]
    tokenizer.no_truncation()
    tokens, types, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    if tokens.max(initial=0) >= vocab_size:
        raise UserError(
            f"wrong tokenizer: it gives token {tokens.max()}, but the model's vocab_size is {vocab_size};"
            " use the model's own tokenizer.json"
        )
    if lengths.min() == 0:
        raise UserError(f"example {lengths.argmin()} has no tokens; remove the empty text from the data")
    types = types if len(texts) == 2 else np.zeros_like(types)
    return TokenStore(tokens, np.append(0, np.cumsum(lengths)), types, np.zeros_like(types))


def _flatten(
    encodings: list[Encoding],
) -> tuple[Int32[np.ndarray, " total"], Int8[np.ndarray, " total"], Int64[np.ndarray, " n"]]:
    tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32)
    types = np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int8)
    return tokens, types, np.array([len(e.ids) for e in encodings], np.int64)
