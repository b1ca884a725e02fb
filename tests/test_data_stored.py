"""Tokens are made once: the second time they come from the cache, the same; a spoilt cache costs time alone."""

import numpy as np
import pytest

from fslora_jax.data import stored
from fslora_jax.data.tokens import TokenStore

TEXTS = [["a b", "c", "é"], ["d", "", "e f\x00\n"]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "LEAST", 1)
    return tmp_path / "cache" / "tokens"


class Tokenising:
    """Counts how often it is done."""

    def __init__(self):
        self.times = 0
        flags = np.array([0, 1, 0, 1, 1, 0], np.int8)
        self.made = TokenStore(
            np.arange(6, dtype=np.int32), np.array([0, 2, 3, 6]), flags, 1 - flags, truncated=2
        )

    def __call__(self) -> TokenStore:
        self.times += 1
        return self.made


def same(found: TokenStore, expected: TokenStore) -> bool:
    return all(
        np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype
        for a, b in zip(found, expected, strict=True)
    )


def test_the_same_texts_are_tokenised_once_and_mapped(cache):
    make = Tokenising()
    for _ in range(3):
        found = stored.stored(TEXTS, ["tokenizer", 12], make)
        assert same(found, make.made)
        assert not found.tokens.flags.writeable  # a file's, not the arrays that were made
    assert make.times == 1
    assert len(list(cache.iterdir())) == 1
    assert found.lengths_of(np.array([2, 0])).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (TEXTS, ["tokenizer", 13]),
        (TEXTS[:1], ["tokenizer", 12]),
        ([["a b", "c", "e"], TEXTS[1]], ["tokenizer", 12]),
        ([["a ", "bc", "é"], TEXTS[1]], ["tokenizer", 12]),
        ([["a b", "c"], ["é", *TEXTS[1]]], ["tokenizer", 12]),
    ],
)
def test_other_texts_or_settings_have_tokens_of_their_own(cache, texts, settings):
    make = Tokenising()
    stored.stored(TEXTS, ["tokenizer", 12], make)
    stored.stored(texts, settings, make)
    assert make.times == 2


@pytest.mark.parametrize("name", TokenStore._fields)
@pytest.mark.parametrize("spoil", ["cut", "gone"])
def test_a_spoilt_store_is_made_anew(cache, name, spoil):
    make = Tokenising()
    stored.stored(TEXTS, [], make)
    (file,) = cache.glob(f"*/{name}.npy")
    file.write_bytes(file.read_bytes()[:-5]) if spoil == "cut" else file.unlink()
    assert same(stored.stored(TEXTS, [], make), make.made)
    assert make.times == 2
    assert same(stored.stored(TEXTS, [], make), make.made)
    assert make.times == 2


def test_a_cache_that_cannot_be_written_does_no_harm(cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    make = Tokenising()
    assert same(stored.stored(TEXTS, [], make), make.made)


def test_a_store_of_which_the_writing_failed_leaves_nothing(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored.np, "save", full)
    make = Tokenising()
    assert same(stored.stored(TEXTS, [], make), make.made)
    assert list(cache.iterdir()) == []


def test_few_texts_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(stored, "LEAST", 1000)
    stored.stored(TEXTS, [], Tokenising())
    assert not cache.exists()
