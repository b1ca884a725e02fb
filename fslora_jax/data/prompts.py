"""Records of instruction data as prompts and completions."""

import re
from typing import Any

from fslora_jax.data.examples import Prompted, text_of
from fslora_jax.data.records import short
from fslora_jax.errors import UserError

OPTIONS = re.compile(r"Answer format:\s*(\S+)\s*$")
"""How an instruction of the LLM-Adapters collection ends: ``Answer format: answer1/answer2``."""

INDENT = " " * 16
"""The indentation inside the collection's prompts: an accident of its first training code, and since a part of it."""

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request."
)


def commonsense(place: str, record: dict[str, Any]) -> Prompted:
    """A record of the LLM-Adapters collection, to the letter as the paper's training prompt.

    The blank before the completion belongs to its first token in all usual tokenizers, so it goes with it; the
    whole text is the paper's. The options are those that the instruction lists.
    """
    instruction, more, output, answer = (
        text_of(place, column, record[column]) for column in ("instruction", "input", "output", "answer")
    )
    listed = OPTIONS.search(instruction)
    names = tuple(listed[1].split("/")) if listed else ()
    if answer not in names or not output.endswith(answer):
        raise UserError(
            f"{place}: the answer is {short(answer)} and the output {short(output)}; expected one of the options "
            f"{list(names)} behind 'Answer format:' in the instruction, and an output that ends with it"
        )
    gap = f"\n{INDENT}\n{INDENT}"
    intro = f"{WITH_INPUT} " if more else f"{PLAIN}  "
    given = f"### Input:\n{INDENT}{more}{gap}" if more else ""
    asked = f"{intro}\n\n{INDENT}### Instruction:\n{INDENT}{instruction}{gap}{given}### Response:\n{INDENT}"
    stem = output.removesuffix(answer)
    return Prompted(asked[:-1], f" {output}", tuple(f" {stem}{name}" for name in names), names)


def alpaca(place: str, record: dict[str, Any]) -> Prompted:
    """A record of ``instruction``, ``output`` and perhaps ``input``, in Stanford Alpaca's prompt.

    >>> alpaca("", {"instruction": "Add.", "input": "1 1", "output": "2"}).prompt.split("###")[1:]
    [' Instruction:\\nAdd.\\n\\n', ' Input:\\n1 1\\n\\n', ' Response:\\n']
    """
    instruction, output = (text_of(place, column, record[column]) for column in ("instruction", "output"))
    more = text_of(place, "input", record.get("input") or "")
    given = f"### Input:\n{more}\n\n" if more else ""
    intro = WITH_INPUT if more else PLAIN
    return Prompted(f"{intro}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n", output)


def text(place: str, record: dict[str, Any]) -> Prompted:
    """Plain text: all of it is learned."""
    return Prompted("", text_of(place, "text", record["text"]))
