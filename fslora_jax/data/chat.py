"""Conversations as prompts and completions, through the chat template of a model's tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fslora_jax.data.examples import Prompted, text_of
from fslora_jax.data.records import short
from fslora_jax.errors import UserError

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ROLES = ("system", "user", "assistant")


def chat_prompts(folder: Path) -> Callable[[str, dict[str, Any]], Prompted]:
    """How a record of ``messages`` becomes text for the model in ``folder``: its last answer is the completion.

    Raises:
      UserError: the model has no chat template, or one that is no template.
    """
    source, tokens = read_template(folder)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise UserError(f"{folder}: the chat template is damaged ({error}); correct it") from error

    def render(place: str, record: dict[str, Any]) -> Prompted:
        messages = check_messages(place, record["messages"])
        try:
            prompt = template.render(messages=messages[:-1], add_generation_prompt=True, **tokens)
            whole = template.render(messages=messages, add_generation_prompt=False, **tokens)
        except TemplateError as error:
            raise UserError(f"{place}: the model's chat template refuses it ({error})") from error
        if not whole.startswith(prompt):
            raise UserError(
                f"{place}: the model's chat template changes what was said before the last answer; "
                "expected one that only appends; use task: alpaca"
            )
        return Prompted(prompt, whole.removeprefix(prompt))

    return render


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template and the special tokens that it may name, from the files that transformers writes."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); save the tokenizer anew") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(template, str):
        raise UserError(
            f"{folder}: no chat template in {CONFIG} or {TEMPLATE}; choose a model with one, or task: alpaca"
        )
    tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return template, {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
        if token
    }


def check_messages(place: str, messages: Any) -> list[dict[str, str]]:
    """The turns of a conversation that ends with an answer of the assistant."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: messages holds {short(messages)}; expected a list of turns")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise UserError(f"{place}: found the turn {short(turn)}; expected a role, one of {list(ROLES)}")
        turns.append({"role": turn["role"], "content": text_of(place, "content", turn.get("content"))})
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise UserError(f"{place}: the last turn is no answer of the assistant; remove the turns behind it")
    return turns


def _refuse(message: str) -> None:
    raise TemplateError(message)
