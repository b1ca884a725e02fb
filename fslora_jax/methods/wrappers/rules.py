"""Which wrapper goes around which method, and why not where it does not."""

from collections.abc import Callable

from fslora_jax.methods.base import Method

Rule = tuple[Callable[[Method], bool], str]

NOT_A_SUM: Rule = (
    lambda method: not method.traits.linear,
    "its server needs the clients' products or norms, not only a weighted sum",
)
RULES: dict[str, tuple[Rule, ...]] = {
    "personalise": (),
    "prune": (
        NOT_A_SUM,
        (lambda method: not method.traits.full_rank, "it gives clients fewer components itself"),
        (
            lambda method: method.traits.moves_base or method.forward is not None,
            "its factors are no lasting components that could be ranked by importance",
        ),
    ),
    "compress": (),
    "clip_and_noise": (
        NOT_A_SUM,
        (lambda method: method.traits.sends_values, "it sends factors, and clipping would shrink them"),
        (
            lambda method: method.from_gradient is not None,
            "its start is made from the clients' gradients, to which nobody adds noise",
        ),
    ),
    "over_the_air": (
        NOT_A_SUM,
        (
            lambda method: bool({"prune", "compress"} & set(method.traits.wrapped)),
            "prune and compress need bits on a link of one's own, and this channel is analogue and shared",
        ),
        (
            lambda method: "clip_and_noise" in method.traits.wrapped,
            "weights over the active clients alone change the sensitivity that clip_and_noise counts on",
        ),
    ),
    "observe": (
        (
            lambda method: (
                bool({"a", "b"} & set(method.traits.personal)) or method.traits.personal_layers > 0
            ),
            "parts of its adapter stay with the clients, so that there is no global model to compare",
        ),
    ),
}
"""Wrapper -> conditions under which it is refused, with the reason."""


def refusal(wrapper: str, method: Method) -> str | None:
    """Why a wrapper does not go around a method; None where it does."""
    if wrapper in method.traits.wrapped:
        return f"{wrapper} is already in it"
    return next((reason for holds, reason in RULES[wrapper] if holds(method)), None)
