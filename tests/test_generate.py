"""Batches of prompts, and the answers that are found in texts."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_models_smollm import PLAIN

from fslora_jax import generate
from fslora_jax.data.answers import answer_of
from fslora_jax.errors import UserError
from fslora_jax.models import NOTHING, Model, Naming

END = 99


def model_that(write) -> Model:
    naming = Naming("", "CAUSAL_LM", (), "Toy")
    return Model(None, None, None, None, {}, naming, 10, 200, generate=write)  # pyright: ignore


def test_each_prompt_gets_its_own_continuation_in_few_programs():
    """A model that writes a prompt's last token and its length, then the end, then more; rows end one by one."""
    shapes = set()

    def write(base, tiers, tokens, lengths, ends, count):
        shapes.add(tokens.shape)
        last = tokens[..., -1]
        return jnp.stack([last, lengths, last * 0 + END, last * 0 + NOTHING], -1)

    prompts = [np.full(n, n % 7, np.int32) for n in (3, 70, 5, 150, 64, 1, *range(2, 30))]
    found = generate.write_on(model_that(write), {}, PLAIN, prompts, [END], 4)
    assert [ids.tolist() for ids in found] == [[p[-1], len(p)] for p in prompts]
    assert shapes == {(1, 16, 192), (1, 16, 64)}


@pytest.mark.parametrize("model", [model_that(None), model_that(print)])
def test_refusals(model):
    with pytest.raises(UserError, match=r"Toy; expected a language model|prompt of 197 tokens and 4 new"):
        generate.write_on(model, {}, PLAIN, [np.zeros(197, np.int32)], [END], 4)


PROTOCOL = {  # LLM-Adapters, commonsense_evaluate.py: extract_answer
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
}
WORDS = ["true", "false", "answer", "solution", "ending", "option", "1", "2", "3", "5", "6", " ", "the"]


@given(st.lists(st.sampled_from(WORDS), max_size=8), st.sampled_from(sorted(PROTOCOL)))
def test_the_answer_is_that_of_the_protocol(words, task):
    text, right = "".join(words), PROTOCOL[task].split("|")[0]
    found = re.findall(PROTOCOL[task], text)
    assert answer_of(text, right, []) == (found[0] if found else None)


def test_other_answers_are_those_that_are_known():
    assert answer_of("well, nothing", "no", ["no", "nothing"]) == "nothing"
