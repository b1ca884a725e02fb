"""What chips can do by their makers' data sheets: bounds on the time of a round, and what its rate is held against."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What one chip can do: bytes of memory, bfloat16 operations, bytes from memory and to other chips a second."""

    memory: int
    flops: float
    memory_rate: float
    link_rate: float


CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9),
}

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L4": 121e12,
}
"""Dense products of bfloat16 a second, by the name that JAX has for a device.

TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e. GPUs: NVIDIA's data sheets of A100, H100, H200 and
L4; the last three give the rate with 2:4 sparsity, twice the dense one (1,979, 1,513, 1,671 and 242 TFLOP/s). Names
are whole, for an "NVIDIA L40S" is no L4, and a part of a GPU (MIG) has a longer name.
"""


def peak_rate(kind: str, dtype: str) -> float | None:
    """A device's operations a second in bfloat16; None for an unknown device, and for a model in another precision.

    >>> peak_rate("NVIDIA H200", "bfloat16"), peak_rate("NVIDIA H200", "float32"), peak_rate("cpu", "bfloat16")
    (989000000000000.0, None, None)
    """
    return PEAKS.get(kind) if dtype == "bfloat16" else None
