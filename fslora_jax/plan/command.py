"""``fslora plan``: does a round fit a TPU slice that is not here, and how fast can it be."""

import json
from collections.abc import Sequence
from pathlib import Path

from fslora_jax.arguments import option, parse_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.plan.abstract import abstract_model
from fslora_jax.plan.search import plans
from fslora_jax.plan.show import as_dict, print_plans
from fslora_jax.plan.topology import EXAMPLES, chip_of, devices_of, prepare


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
    rows, places = args["rows"] or config.federation.batch_size, 0 if args["num_labels"] else row_length
    shape = BatchShape(rows, row_length, places)
    model = abstract_model(config, args["num_labels"])
    found = list(plans(config, model, shape, devices_of(topology), chip_of(topology), args["tries"]))
    if args["json"] is None:
        print_plans(found, topology)
    else:
        values = {"topology": topology, "plans": [as_dict(plan) for plan in found]}
        args["json"].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
