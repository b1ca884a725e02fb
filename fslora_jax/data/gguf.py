"""The tokenizer that a GGUF file brings along, as ``tokenizers`` has it."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fslora_jax.errors import UserError
from fslora_jax.gguf import Gguf, read_gguf

SPLITS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
"""``tokenizer.ggml.pre`` -> how a text is cut before byte pairs are merged."""

CONTROL, USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``: tokens that texts name in full, special ones and others."""


def gguf_tokenizer(path: Path) -> Tokenizer:
    """Byte pair encoding from a file's metadata.

    Raises:
      UserError: it is another kind of tokenizer, or incomplete.
    """
    gguf = read_gguf(path)
    model, split = (_get(gguf, key, str) for key in ("model", "pre"))
    if model != "gpt2" or split not in SPLITS:
        raise UserError(
            f"{path}: its tokenizer is {model!r} with {split!r}; expected 'gpt2' with one of {list(SPLITS)}; "
            "put the model's tokenizer.json beside it"
        )
    tokens, types, merges = (_get(gguf, key, list) for key in ("tokens", "token_type", "merges"))
    numbers = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(numbers, [tuple(merge.split(" ")) for merge in merges]))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{path}: not a tokenizer ({error}); fetch the file again") from None
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == kind])
    tokenizer.post_processor = _ends(gguf, tokens)
    return tokenizer


def gguf_end(path: Path) -> int:
    """The token that ends a text, as a ``.gguf`` file says."""
    return _get(read_gguf(path), "eos_token_id", int)


def _ends(gguf: Gguf, tokens: list[str]) -> processors.TemplateProcessing:
    """Begin and end of a text, where the file asks for them."""
    begin, end = (
        [tokens[_get(gguf, f"{name}_token_id", int)]] if _get(gguf, f"add_{name}_token", bool, False) else []
        for name in ("bos", "eos")
    )
    return processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[
            *begin,
            "$A",
            *end,
            *(f"{token}:1" for token in begin),
            "$B:1",
            *(f"{token}:1" for token in end),
        ],
        special_tokens=[(token, tokens.index(token)) for token in begin + end],
    )


def _get(gguf: Gguf, name: str, kind: type, default: Any = None) -> Any:
    value = gguf.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, kind):
        raise UserError(
            f"{gguf.path}: tokenizer.ggml.{name} is {value!r}; expected a {kind.__name__}; fetch the file again"
        )
    return value
