"""Settings of the two optimisers: the clients' and the server's."""

from typing import Annotated, Literal

import optax
from pydantic import Field, model_validator

from fslora_jax.settings import Fraction, NonNegative, Positive, Section


class ClientOptimizerConfig(Section):
    """The optimiser of the local steps; its state starts afresh in every round."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` takes `momentum`; `adamw` takes `b1`, `b2`, `eps`."""
    learning_rate: Positive = 5e-4
    """Peak learning rate."""
    head_learning_rate: Positive | None = None
    """Peak learning rate of the dense head; by default the same."""
    momentum: Fraction = 0.0
    """Momentum of `sgd`."""
    b1: Fraction = 0.9
    """First decay rate of `adamw`."""
    b2: Fraction = 0.999
    """Second decay rate of `adamw`."""
    eps: Positive = 1e-8
    """Denominator's offset of `adamw`."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay on what the client trains."""
    max_grad_norm: Positive | None = None
    """Clips each client's gradient to this global norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate to zero over all steps of the run."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds over which the learning rate rises from zero."""


class ServerOptimizerConfig(Section):
    """The optimiser of the averaged change; the default is plain averaging."""

    name: str = "sgd"
    """Any optimiser of optax by its name: sgd, adam, yogi, adagrad, lion ..."""
    learning_rate: Positive = 1.0
    """Server learning rate; 1 with sgd is plain averaging."""
    options: dict[str, float | bool] = {}
    """Further keyword arguments of that optimiser, such as {momentum: 0.9}."""

    @model_validator(mode="after")
    def _builds(self) -> "ServerOptimizerConfig":
        self.build()
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it is plain averaging."""
        return (self.name, self.learning_rate, self.options) == ("sgd", 1.0, {})

    def build(self) -> optax.GradientTransformation:
        """The optax transformation of this section."""
        factory = getattr(optax, self.name, None)
        if self.name.startswith("_") or not callable(factory):
            raise ValueError(
                f"name: {self.name!r} is no optimiser of optax; expected one such as sgd or adam"
            )
        try:
            optimizer = factory(learning_rate=self.learning_rate, **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optax.{self.name} does not take these options: {error}") from None
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(f"name: optax.{self.name} is no optimiser; expected one such as sgd or adam")
        return optimizer
