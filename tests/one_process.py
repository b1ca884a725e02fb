"""One of several processes that play rounds together: ``one_process.py ADDRESS PROCESSES NUMBER DEVICES FILE``."""

import sys

import jax


def main(address: str, processes: str, number: str, devices: str, file: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(number), initialization_timeout=60)

    import compare  # after jax.distributed: nothing may touch a device before
    import numpy as np
    import toy

    mesh = toy.mesh_of(jax.device_count())
    found = toy.play(compare.fslora_with("momentum"), toy.OPTIMIZERS["momentum"][0], dropout=0.4, mesh=mesh)
    weights = {"/".join(map(str, name)): value for name, value in compare.last(found).items()}
    losses = {f"loss/{t}/{c}": loss for (t, c), loss in found.losses.items()}
    np.savez(file, devices=jax.device_count(), **weights, **losses)


if __name__ == "__main__":
    main(*sys.argv[1:])
