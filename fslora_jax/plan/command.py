"""``fslora plan``: does a round fit a TPU slice that is not here, and how fast can it be."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fslora_jax import hub
from fslora_jax.arguments import option, parse_config
from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.models import Model
from fslora_jax.models.families import build_model
from fslora_jax.plan.search import plans
from fslora_jax.plan.show import as_dict, print_plans
from fslora_jax.plan.topology import EXAMPLES, chip_of, devices_of, prepare
from fslora_jax.tensors import read_object


def plan_command(argv: Sequence[str]) -> None:
    """Compile the round of a config for a TPU slice, with no TPU at hand and no weights read.

    The real program, from the real TPU compiler (pip install 'fslora_jax[plan]'): memory of each chip, operations,
    what the chips exchange, and lower bounds on the time of a round from the chip's data sheet. Where it does not
    fit, other ways are tried: one client at a time, weights over more chips. Of the model only config.json is read,
    of the data nothing.
    """
    config, _, args = parse_config(
        "plan",
        plan_command.__doc__ or "",
        argv,
        topology=option(str, "v5e:4x4", f"Slice, such as {EXAMPLES}."),
        rows=option(
            int | None, None, "Rows of a minibatch; by default one for each example, the worst case."
        ),
        num_labels=option(int, 2, "Labels of the task; 0 trains next tokens."),
        tries=option(int, 4, "Other ways to try where the config does not fit."),
        json=option(Path | None, None, "File for all numbers; by default a table is printed."),
    )
    topology = args["topology"]
    prepare(topology)
    row_length = config.data.row_length or config.data.max_length
    rows, multiple = args["rows"] or config.federation.batch_size, config.federation.rows_per_pass or 1
    shape = BatchShape(-(-rows // multiple) * multiple, row_length, 0 if args["num_labels"] else row_length)
    model = abstract_model(config, args["num_labels"])
    found = list(plans(config, model, shape, devices_of(topology), chip_of(topology), args["tries"]))
    if args["json"] is None:
        print_plans(found, topology)
    else:
        values = {"topology": topology, "batch": shape._asdict(), "plans": [as_dict(plan) for plan in found]}
        args["json"].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def abstract_model(config: Config, num_labels: int, changes: Mapping[str, Any] | None = None) -> Model:
    """The model of a config from its ``config.json`` alone, which may lie in a folder without weights.

    ``changes`` replace fields that are there.
    """
    local = Path(config.model.name).expanduser() / "config.json"
    path = local if local.is_file() else hub.resolve_model(config.model.name) / "config.json"
    fields = dict(read_object(path))
    return build_model(
        fields | {name: value for name, value in (changes or {}).items() if name in fields},
        num_labels=num_labels,
        pooling=config.model.pooling,
        task="sequence" if num_labels else "causal",
        dtype=config.model.dtype,
        lora_dropout=config.lora.lora_dropout,
        attention=config.model.attention,
        remat=config.model.remat,
    )
