"""What loading a model takes of the host's memory; a process of its own measures it.

``python tests/loading_peak.py FOLDER [DTYPE [QUANTISATION]]`` prints it for a model's folder.
``python tests/loading_peak.py --make MEGABYTES FOLDER`` writes a random Llama in shards, in float32.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from fslora_jax.models import build_model, load_model
from fslora_jax.models.families import find_family
from fslora_jax.models.table import sources
from fslora_jax.tensors import INDEX

SHARD = 128e6
"""Bytes from which on a new shard begins."""


def config_of(megabytes: float) -> dict:
    """A Llama with the proportions of a large one: three quarters feed-forward, a tenth embeddings."""
    layers, hidden = 16, 64 * round((megabytes * 1e6 / 4 / 16 / 14.25) ** 0.5 / 64)
    return {
        "model_type": "llama",
        "vocab_size": 20 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def make(folder: Path, megabytes: float) -> None:
    """Shards, index and config."""
    config = config_of(megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model, family = build_model(config, num_labels=2, pooling="native"), find_family(config)
    rng, index, shard = np.random.default_rng(0), {}, {}

    def flush() -> None:
        file = f"model-{len(set(index.values())):05}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for source in sources(family, jax.eval_shape(model.init_base, jax.random.key(0))):
        shard[family.prefix + source.name] = rng.random(source.shape, np.float32)
        if sum(value.nbytes for value in shard.values()) > SHARD:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def memory(name: str) -> int:
    """``VmRSS``, what this process holds, or ``VmHWM``, the most that it ever held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(folder: Path, dtype: str = "float32", quantization: str = "none") -> dict[str, float]:
    """The model's bytes as it is held, and how far memory rose above what the process held before."""
    jax.block_until_ready(jax.numpy.zeros(1))
    before = memory("VmRSS")
    base = load_model(folder, num_labels=2, pooling="native", dtype=dtype, quantization=quantization)[1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(base)))
    rise = memory("VmHWM") - before
    return {"model_mb": size / 1e6, "rise_mb": rise / 1e6, "ratio": round(rise / size, 3)}


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(Path(sys.argv[3]), float(sys.argv[2]))
    else:
        print(json.dumps(measure(Path(sys.argv[1]), *sys.argv[2:])))
