"""Array types that cross module borders, and the letters of their dimensions.

| letter | dimension                                   | letter | dimension                          |
|--------|---------------------------------------------|--------|------------------------------------|
| C      | clients held by one device in one chunk     | N      | layers of the model                |
| H      | local steps of a round                      | i, o   | in and out features of a module    |
| B      | packed rows of a batch                      | r      | rank of the global adapter         |
| E      | examples of a batch                         | k      | rank that a client holds, k <= r   |
| L      | tokens of a row                             | D, V   | model width, vocabulary            |
| T      | predicted tokens of a row                   |        |                                    |
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, Real


class Pair(NamedTuple):
    """The two LoRA factors of one module, over all layers; ``delta W = b.T @ a`` per layer.

    Both keep the rank axis second to last, so a sketch is one gather on one axis. ``a`` is the paper's
    ``A (r, n)``; ``b`` is the paper's ``B (m, r)`` transposed.
    """

    a: Float[Array, "*C N r i"]
    b: Float[Array, "*C N r o"]


class Rows(NamedTuple):
    """A number for each rank component of the two factors: 1 where it may move, or by whom it was moved."""

    a: Float[Array, "*C N r"]
    b: Float[Array, "*C N r"]


Adapter = dict[str, Pair]
"""Module path inside a layer (Hugging Face's, such as ``attention.self.query``) -> its factors."""

Head = dict[str, dict[str, Float[Array, "..."]]]
"""Module path outside the layers (``classifier``) -> ``{"kernel": (i, o), "bias": (o,)}``; trained densely."""


class Trainable(NamedTuple):
    """What training changes: the adapter, and the dense head where the task has one."""

    adapter: Adapter
    head: Head


class Local(NamedTuple):
    """What one client holds during a round; stacked over clients inside a tier.

    ``scale`` multiplies each rank component in the forward pass (LoRA scale times ``r/k`` on drawn
    components, 0 on spare ones), ``trains`` says which rows of either factor may move, and ``index`` where
    each component lives in the global adapter.
    """

    weights: Trainable
    scale: dict[str, Float[Array, "*C N k"]]
    trains: dict[str, Rows]
    index: dict[str, Int[Array, "*C N k"]]


class Batch(NamedTuple):
    """One minibatch of packed rows. An example lies within one row; a row holds one or several.

    ``segments`` is 0 on padding and ``e + 1`` on the tokens of example ``e`` of the batch; ``positions``
    restart at 0 with each example; ``types`` is 1 on the second text of a pair where the tokenizer says so
    (BERT), else 0; ``labels`` are classes, or the numbers of a regression; ``weights`` is 0 for an example that
    is only a filler. ``places`` are a language model's questions: the tokens of each row whose next token it
    shall predict, -1 where a row has fewer; T is 0 for a task with labels.
    """

    tokens: Int[Array, "*C B L"]
    segments: Int[Array, "*C B L"]
    positions: Int[Array, "*C B L"]
    types: Int[Array, "*C B L"]
    labels: Real[Array, "*C E"]
    weights: Float[Array, "*C E"]
    places: Int[Array, "*C B T"]


class Score(NamedTuple):
    """What each example of a batch adds up to, over its label or its next tokens; fillers are 0 everywhere.

    ``count`` is how much was asked, ``loss`` and ``correct`` are sums over it, and ``predicted`` is the label or
    number that the model gives (0 for next tokens). Sums over examples and batches merge by addition.
    """

    loss: Float[Array, "*C E"]
    correct: Float[Array, "*C E"]
    count: Float[Array, "*C E"]
    predicted: Float[Array, "*C E"]
