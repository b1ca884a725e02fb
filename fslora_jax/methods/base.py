"""What a federated method is: a NamedTuple of pure functions, and the values that pass between them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.methods.spec import Traffic
from fslora_jax.types import Head, Local, Rows, Trainable

TOLD = "told"
"""The name in a server's memory of numbers that go into the record of each round, by their names there."""


class Server(NamedTuple):
    """All that survives a round on the server.

    ``base_delta`` is what a method has merged into the frozen kernels ``(N, i, o)`` of each module, empty for methods
    that leave them alone; ``memory`` is whatever else methods and wrappers keep, each under its name. ``announced``
    is there during a round only.
    """

    weights: Trainable
    opt_state: PyTree
    round: Int[Array, ""]
    base_delta: dict[str, Float[Array, "N i o"]] = {}
    memory: dict[str, PyTree] = {}
    announced: PyTree = ()


class Client(NamedTuple):
    """One client as the round sees it: who, how many components it trains, its share of the average.

    ``memory`` is what methods and wrappers let a client keep from round to round, each under its name.
    """

    id: Int[Array, "*C"]
    k: Int[Array, "*C"]
    weight: Float[Array, "*C"]
    memory: dict[str, PyTree] = {}


class Payload(NamedTuple):
    """What a client sends: for the components it holds a change (or a value), where they live, which were trained.

    ``extra`` holds what a method or a wrapper sends beside it, under its own name.
    """

    delta: Trainable
    index: dict[str, Int[Array, "*C N k"]]
    trains: dict[str, Rows]
    extra: dict[str, PyTree] = {}


class Combined(NamedTuple):
    """What the network hands to the server.

    ``delta`` is the weighted sum of what clients sent, ``mass`` the sum of the weights of those that trained a
    component; ``extra`` holds further sums, ``peak`` maxima over all clients, each under the name of its owner.
    """

    delta: Trainable
    mass: dict[str, Rows]
    extra: dict[str, PyTree] = {}
    peak: dict[str, PyTree] = {}


class Traits(NamedTuple):
    """What decides where a method may be used.

    ``linear``: the server needs only weighted sums of what is sent, so noise or a channel may sit on the sum.
    ``moves_base``: the frozen kernels change over the rounds. ``remembers``: clients keep something between rounds.
    ``full_rank``: every client trains all r components. ``holds_all``: every client holds all r and trains k.
    ``own_step``: the server's step is the method's own, so there is no room for a server optimiser.
    ``sends_values``: clients send factors, not what changed in them. ``sends_indices``: also which they drew;
    ``sends_numbers``: so many further numbers.
    ``personal``: the parts that stay with the client, and both factors of the ``personal_layers`` last layers.
    ``wrapped``: the wrappers inside, by name.
    """

    linear: bool = True
    moves_base: bool = False
    remembers: bool = False
    full_rank: bool = False
    holds_all: bool = False
    own_step: bool = False
    sends_values: bool = False
    sends_indices: bool = False
    sends_numbers: int = 0
    personal: tuple[str, ...] = ()
    personal_layers: int = 0
    wrapped: tuple[str, ...] = ()


class Method(NamedTuple):
    """A federated method as pure functions, as optax has gradient transformations.

    ``download``, ``upload`` and the optional functions are written for one client. ``combine`` is the only place
    where clients meet: it sums over the clients at hand, and the round merges these sums over chunks and devices.
    ``traffic`` is for a whole cohort: ``(round, clients, values of the head) -> bytes of each client``.

    Optional, None where a method has no use for it:

    - ``announce``: what a client says of itself before the round; ``download`` and ``upload`` find the cohort's
      weighted sum of it in ``server.announced``;
    - ``first_memory``: what a client remembers before its first round;
    - ``from_gradient``: the server before the first round, from the clients' mean gradient at the frozen kernels;
    - ``penalty``: added to the local loss;
    - ``forward``: from what a client trains to the factors that the model takes;
    - ``at_step``: changes scales and trained rows before a local step;
    - ``final``: the adapter that is evaluated and exported, by default the global one.
    """

    init: Callable[[Key[Array, ""], Head], Server]
    download: Callable[[Key[Array, ""], Server, Client, int], Local]
    upload: Callable[[Key[Array, ""], Server, Local, Local, Client], tuple[Payload, PyTree]]
    combine: Callable[[Sequence[Payload], Sequence[Float[Array, " C"]]], Combined]
    update: Callable[[Key[Array, ""], Server, Combined], Server]
    traffic: Callable[[int, Client, int], Traffic]
    traits: Traits = Traits()
    announce: Callable[[Client], PyTree] | None = None
    first_memory: Callable[[Server], PyTree] | None = None
    from_gradient: Callable[[Server, dict[str, Float[Array, "N i o"]]], Server] | None = None
    penalty: Callable[[Local], Float[Array, ""]] | None = None
    forward: Callable[[Server, Local], Local] | None = None
    at_step: Callable[[Key[Array, ""], Client, Local], Local] | None = None
    final: Callable[[Server], Trainable] | None = None

    def adapter(self, server: Server) -> Trainable:
        """The global adapter and head, as they are evaluated and exported."""
        return server.weights if self.final is None else self.final(server)
