"""Which answer a generated text gives, by the patterns of the LLM-Adapters protocol (arXiv 2304.01933)."""

import re
from collections.abc import Sequence

PATTERNS = ("true|false", "solution[12]", "answer[1-5]", "ending[1-4]", "option[12]")
"""BoolQ; PIQA; ARC, OpenBookQA and Social IQa; HellaSwag; WinoGrande."""


def answer_of(text: str, right: str, names: Sequence[str]) -> str | None:
    """The first answer in ``text`` of the kind that ``right`` is, or None.

    The kind is one of ``PATTERNS``; answers that none of them knows are those in ``names``.

    >>> answer_of("the correct answer is answer2, not answer1", "answer1", [])
    'answer2'
    """
    known = (pattern for pattern in PATTERNS if re.fullmatch(pattern, right))
    pattern = next(known, None) or "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    found = re.search(pattern, text)
    return found[0] if found else None
