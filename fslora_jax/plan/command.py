"""``fslora plan``: does a round fit a TPU slice that is not here, and how fast can it be."""

import json
from collections.abc import Sequence
from pathlib import Path

from fslora_jax.arguments import option, parse_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.plan.abstract import abstract_model
from fslora_jax.plan.apart import compiler_for
from fslora_jax.plan.search import Job, best, plans
from fslora_jax.plan.show import as_dict, print_plans
from fslora_jax.plan.topology import EXAMPLES, chip_of, count_of, prepare
from fslora_jax.rundir import check_writable, write_atomically


def plan_command(argv: Sequence[str]) -> None:
    """Compile the round of a config for a TPU slice, with no TPU at hand and no weights read.

    The real program, from the real TPU compiler (pip install 'fslora_jax[plan]'): memory of each chip, operations,
    what the chips exchange, and lower bounds on the time of a round from the chip's data sheet. By what memory was
    measured, other settings are tried: as many clients at a time as should fit, and where not even one does, weights
    over more chips. Of the model only config.json is read, of the data nothing.
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
        tries=option(int, 4, "Compilations at most, of the config and of others that may fit or be faster."),
        json=option(Path | None, None, "File for all numbers; by default a table is printed."),
    )
    topology = args["topology"]
    if args["tries"] < 1:
        raise UserError(f"--tries: found {args['tries']}; expected 1 or more, the first is the config's own")
    if args["num_labels"] < 0 or (args["rows"] is not None and args["rows"] < 1):
        raise UserError(
            f"--num-labels, --rows: found {args['num_labels']} and {args['rows']}; expected 0 or more labels, and 1 or "
            "more rows"
        )
    if args["json"] is not None:
        check_writable("--json", args["json"])
    prepare(topology)
    row_length = config.data.row_length or config.data.max_length
    rows, places = args["rows"] or config.federation.batch_size, 0 if args["num_labels"] else row_length
    shape = BatchShape(rows, row_length, places)
    job = Job(
        clients=config.clients_per_round,
        rows=config.federation.rows_per_pass or rows,
        heads=abstract_model(config, args["num_labels"]).heads,
        devices=count_of(topology),
        chip=chip_of(topology),
    )
    compiler = compiler_for(topology, args["num_labels"], shape)
    found = list(plans(config, job, compiler, args["tries"]))
    if args["json"] is None:
        print_plans(found, topology)
    else:
        chosen = best(found)
        values = {
            "topology": topology,
            "plans": [as_dict(plan) for plan in found],
            "best": chosen and chosen.setting.settings,
        }
        write_atomically(args["json"], json.dumps(values, indent=1) + "\n")
