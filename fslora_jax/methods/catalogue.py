"""All methods and wrappers by name, what each is, and how a config's choice becomes one `Method`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Method
from fslora_jax.methods.fed_plora import fed_plora
from fslora_jax.methods.fed_sb import fed_sb
from fslora_jax.methods.fedex_lora import fedex_lora
from fslora_jax.methods.fedit import fedit
from fslora_jax.methods.fedsa_lora import fedsa_lora
from fslora_jax.methods.ffa_lora import ffa_lora
from fslora_jax.methods.flexlora import flexlora
from fslora_jax.methods.flora import flora
from fslora_jax.methods.fslora import fslora
from fslora_jax.methods.hafl import hafl
from fslora_jax.methods.hetlora import hetlora, zero_padding
from fslora_jax.methods.lora_fair import lora_fair
from fslora_jax.methods.rac_lora import rac_lora
from fslora_jax.methods.raflora import raflora
from fslora_jax.methods.rolora import rolora
from fslora_jax.methods.spec import Spec
from fslora_jax.methods.wrappers.clip_and_noise import clip_and_noise
from fslora_jax.methods.wrappers.compress import compress
from fslora_jax.methods.wrappers.observe import observe
from fslora_jax.methods.wrappers.over_the_air import over_the_air
from fslora_jax.methods.wrappers.personalise import personalise
from fslora_jax.methods.wrappers.prune import prune
from fslora_jax.methods.wrappers.rules import refusal
from fslora_jax.methods.xgblora import xgblora
from fslora_jax.settings import checked, options_of, suggest


class Entry(NamedTuple):
    """A method or wrapper: what makes it, what it is in one line, its paper, what travels up, what is exact."""

    make: Callable[..., Method]
    line: str
    paper: str
    travels: str
    exact: str


METHODS: dict[str, Entry] = {
    "fslora": Entry(
        fslora, "a random k of the r components, gain r/k", "2501.19389", "k components", "E[S] = I"
    ),
    "fedit": Entry(fedit, "FedAvg of A and B apart", "2305.05644", "A, B", "k = r: FSLoRA"),
    "ffa_lora": Entry(ffa_lora, "A frozen and random, B averaged", "2403.12313", "B", "average of products"),
    "rolora": Entry(rolora, "B and A take turns by round", "2502.01755", "B or A", "average of products"),
    "fedsa_lora": Entry(fedsa_lora, "A shared, B and head personal", "2410.01463", "A", "B_i untouched"),
    "zero_padding": Entry(
        zero_padding,
        "the first k components, padded with zeros",
        "2401.06432",
        "k components",
        "k = r: FedIT",
    ),
    "hetlora": Entry(
        hetlora,
        "zero padding weighted by |B_i A_i|, self-pruning ranks",
        "2401.06432",
        "k components, one norm",
        "equal norms and ranks: FedIT",
    ),
    "flexlora": Entry(
        flexlora,
        "SVD of the average of products",
        "2402.11505",
        "k components",
        "to singular values beyond r",
    ),
    "flora": Entry(
        flora, "stacked factors merged into the base", "2409.05976", "k components", "average of products"
    ),
    "fedex_lora": Entry(
        fedex_lora, "FedIT, its error merged into the base", "2410.09432", "A, B", "average of products"
    ),
    "fed_sb": Entry(
        fed_sb, "R between fixed B and A", "2502.15436", "r x r of each module", "average of products"
    ),
    "lora_fair": Entry(
        lora_fair,
        "FedIT, B corrected by a ridge or cosine fit",
        "2411.14961",
        "A, B",
        "average projected on A",
    ),
    "hafl": Entry(
        hafl,
        "the k most important components, averaged over trainers",
        "2411.06581",
        "k components",
        "k = r: FedIT",
    ),
    "raflora": Entry(
        raflora,
        "average over each component's trainers, then SVD",
        "2602.13486",
        "k components",
        "equal ranks: FlexLoRA",
    ),
    "fed_plora": Entry(
        fed_plora, "train a random k, hold the rest", "2602.16936", "k components", "k = r: FedIT"
    ),
    "xgblora": Entry(
        xgblora,
        "boost random layers with fresh factors, merged",
        "2410.19694",
        "factors of the layers",
        "average of products",
    ),
    "rac_lora": Entry(
        rac_lora,
        "one factor drawn, the other trained and merged",
        "2410.08305",
        "one factor",
        "average of products",
    ),
}
"""Name -> method; a new method is a file and a row here."""

WRAPPERS: dict[str, Entry] = {
    "personalise": Entry(
        personalise, "parts stay with the client", "2309.01816", "the rest", "parts: []: the method itself"
    ),
    "prune": Entry(
        prune,
        "weak links send fewer components, by importance",
        "2309.01816",
        "what the link carries in time",
        "long deadline: the method itself",
    ),
    "compress": Entry(
        compress,
        "the largest values in few bits, with error feedback",
        "1809.07599",
        "a part of the values",
        "ratio 1, 32 bits: the method itself",
    ),
    "clip_and_noise": Entry(
        clip_and_noise,
        "differential privacy of clients",
        "1710.06963",
        "as the method, clipped",
        "large clip, no noise: the method itself",
    ),
    "over_the_air": Entry(
        over_the_air,
        "a fading channel adds up the uploads, with noise",
        "2310.10089",
        "as the method, analogue",
        "no noise, perfect CSI: the method itself",
    ),
    "observe": Entry(
        observe,
        "records how far the server lands from the average of clients",
        "2410.09432",
        "as the method",
        "the method itself",
    ),
}
"""Name -> wrapper, ``(method, spec, **options) -> method``, in the order of an upload's way to the server."""


def build(
    name: str,
    options: Mapping[str, Any],
    wrappers: Mapping[str, Mapping[str, Any]],
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
) -> Method:
    """The method of a config in its wrappers, in the order of `WRAPPERS` whatever theirs.

    Raises:
      UserError: an unknown name or option, or a combination that its members rule out.
    """
    entry = _entry(METHODS, name, "federation.method")
    method = entry.make(spec, server_optimizer, **_options(entry, options, "federation.method_options"))
    entries = {wrapper: _entry(WRAPPERS, wrapper, "federation.wrappers") for wrapper in wrappers}
    for wrapper in sorted(wrappers, key=list(WRAPPERS).index):
        entry, chosen = entries[wrapper], wrappers[wrapper]
        if (reason := refusal(wrapper, method)) is not None:
            raise UserError(f"federation.wrappers: {wrapper} cannot go around {name}: {reason}")
        method = entry.make(method, spec, **_options(entry, chosen, f"federation.wrappers.{wrapper}"))
    return method


def _entry(known: Mapping[str, Entry], name: str, field: str) -> Entry:
    if name not in known:
        raise UserError(f"{field}: unknown {name!r}{suggest(name, list(known))}")
    return known[name]


def _options(entry: Entry, values: Mapping[str, Any], field: str) -> dict[str, Any]:
    form = checked(options_of(entry.make), dict(values), field)
    return {name: getattr(form, name) for name in type(form).model_fields}
