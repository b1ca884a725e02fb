"""Tokenising against tokenizers itself, one example at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fslora_jax.data import tokens
from fslora_jax.data.tokens import TokenStore, encode, load_tokenizer
from fslora_jax.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
FIRST = ["a b c", "", "d", "e f g h a b"]
SECOND = ["d e", "f", "g h a b c", "a b c d e f g h"]


def build(special: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="[CLS]:1 $A:1 [SEP]:1",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return tokenizer


def rows(store: TokenStore, values: np.ndarray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def test_the_settings_of_the_file_are_dropped(tmp_path):
    tokenizer = build()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a b c d").ids == [2, 4, 5, 6, 7, 3]


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"^\S*tokenizer\.json: no such file; .*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "{\n  broken"])
def test_a_broken_tokenizer(tmp_path: Path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"^\S*tokenizer\.json: not a tokenizer [^\n]*$"):
        load_tokenizer(tmp_path)


def test_texts_in_several_chunks(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 3)
    store = encode(build(), (FIRST,), 16, len(WORDS))
    assert rows(store, store.tokens) == [[2, 4, 5, 6, 3], [2, 3], [2, 7, 3], [2, 8, 9, 10, 11, 4, 5, 3]]
    assert store.lengths.tolist() == [5, 2, 3, 8]
    assert not store.types.any()
    assert [part.dtype for part in store[:4]] == [np.int32, np.int64, np.int8, np.int8]


def test_pairs_have_types():
    store = encode(build(), (FIRST, SECOND), 32, len(WORDS))
    assert rows(store, store.tokens)[0] == [2, 4, 5, 6, 3, 7, 8, 3]
    assert rows(store, store.types)[0] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert rows(store, store.types)[1] == [0, 0, 1, 1]


@pytest.mark.parametrize("texts", [(FIRST,), (FIRST, SECOND)])
@pytest.mark.parametrize("max_length", [4, 6, 9])
def test_truncation_keeps_the_special_tokens(texts, max_length):
    whole = encode(build(), texts, 99, len(WORDS))
    short = encode(build(), texts, max_length, len(WORDS))
    assert (short.lengths == np.minimum(whole.lengths, max_length)).all()
    for ids in rows(short, short.tokens):
        assert (ids[0], ids[-1], ids.count(3)) == (2, 3, len(texts))


def test_encoding_leaves_the_tokenizer_as_it_was():
    tokenizer = build()
    before = tokenizer.to_str()
    encode(tokenizer, (FIRST,), 4, len(WORDS))
    assert tokenizer.to_str() == before


def test_the_wrong_tokenizer():
    with pytest.raises(UserError, match="it gives token 11, but the model's vocab_size is 11"):
        encode(build(), (FIRST,), 16, 11)


@pytest.mark.parametrize(("texts", "least"), [((FIRST,), 3), ((FIRST, SECOND), 4)])
def test_no_room_beside_the_special_tokens(texts, least):
    encode(build(), texts, least, len(WORDS))
    with pytest.raises(UserError, match=f"max_length is {least - 1}, but special tokens"):
        encode(build(), texts, least - 1, len(WORDS))


def test_an_example_without_tokens():
    with pytest.raises(UserError, match="example 1 has no tokens"):
        encode(build(special=False), (FIRST,), 16, len(WORDS))


PROMPTS, COMPLETIONS = ["a b c", "a", "", "a b"], [" d e", " b", "c d e", " h h h h"]


def encode_all(max_length: int = 99, **options) -> TokenStore:
    """Texts that begin with [CLS] and end with [SEP]."""
    tokenizer = build(special=False)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    options = {"end": 3} | options
    return tokens.encode_prompts(tokenizer, (PROMPTS, COMPLETIONS), max_length, len(WORDS), **options)


def test_completions_are_learned_and_prompts_are_not():
    store = encode_all()
    assert rows(store, store.tokens)[:3] == [[2, 4, 5, 6, 7, 8, 3], [2, 4, 5, 3], [2, 6, 7, 8, 3]]
    assert rows(store, store.learned)[:3] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert store.truncated == 0


def test_an_end_that_the_tokenizer_writes_is_learned_as_well():
    store = tokens.encode_prompts(build(), (PROMPTS, COMPLETIONS), 99, len(WORDS), end=3)
    assert rows(store, store.tokens)[1] == [2, 4, 5, 3]
    assert rows(store, store.learned)[1] == [0, 0, 1, 1]


def test_all_but_the_first_token_is_learned_on_request():
    assert rows(encode_all(), encode_all(learn_all=True).learned)[1] == [0, 1, 1, 1]


def test_texts_with_special_tokens_of_their_own():
    store = encode_all(end=None)
    assert rows(store, store.tokens)[1:3] == [[4, 5], [6, 7, 8]]
    assert rows(store, store.learned)[1:3] == [[0, 1], [0, 1, 1]]


def test_a_prompt_too_long_loses_its_beginning_and_the_completion_stays():
    store = encode_all(5)
    assert rows(store, store.tokens) == [[2, 6, 7, 8, 3], [2, 4, 5, 3], [2, 6, 7, 8, 3], [2, 11, 11, 11, 11]]
    assert rows(store, store.learned)[0] == [0, 0, 1, 1, 1]
    assert store.truncated == 2
    assert encode(build(), (FIRST,), 4, len(WORDS)).truncated == 2


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ({"tokenizer_config": {"eos_token": "[SEP]"}, "config": {"eos_token_id": 7}}, 3),
        ({"tokenizer_config": {"eos_token": {"content": "[SEP]"}}}, 3),
        ({"config": {"eos_token_id": [5, 6]}}, 5),
    ],
)
def test_the_end_of_a_text(tmp_path, said, number):
    with pytest.raises(UserError, match="no end of text"):
        tokens.end_token(tmp_path, build())
    for name, content in said.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert tokens.end_token(tmp_path, build()) == number
