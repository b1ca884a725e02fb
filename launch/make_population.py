#!/usr/bin/env python3
"""Writes a tiny random BERT and any number of short labelled texts, for configs/population.yaml.

usage: python launch/make_population.py FOLDER [EXAMPLES, by default 2,000,000]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WIDTH, WIDE, LAYERS, WORDS, LONGEST = 32, 64, 2, 1000, 16
CHUNK = 100_000


def make_model(folder: Path) -> None:
    """A BERT as transformers saves it, with random weights, and a tokenizer of whole words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "max_position_embeddings": LONGEST,
        "type_vocab_size": 2,
    }
    config |= {
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(random_tensors(len(words)), folder / "model.safetensors", metadata={"format": "pt"})


def random_tensors(vocabulary: int) -> dict[str, np.ndarray]:
    """The tensors of transformers' BertModel."""
    modules = {"pooler.dense": (WIDTH, WIDTH)}
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        modules |= {f"{layer}.attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        modules |= {f"{layer}.attention.output.dense": (WIDTH, WIDTH)}
        modules |= {f"{layer}.intermediate.dense": (WIDE, WIDTH), f"{layer}.output.dense": (WIDTH, WIDE)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    rows = {"word": vocabulary, "position": LONGEST, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (count, WIDTH) for name, count in rows.items()}
    shapes |= {f"{name}.weight": shape for name, shape in modules.items()}
    rng = np.random.default_rng(0)
    tensors = {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in modules.items()}
    for name in norms:
        tensors |= {f"{name}.weight": np.ones(WIDTH, np.float32), f"{name}.bias": np.zeros(WIDTH, np.float32)}
    return tensors


def make_texts(path: Path, count: int) -> None:
    """Texts of 4 to 12 words; the label says whether words of the lower or of the upper half are more."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(WORDS)])
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            leaning, lengths = rng.random((size, 1)), rng.integers(4, 13, size)
            upper = rng.random((size, 12)) < leaning
            chosen = words[rng.integers(WORDS // 2, size=(size, 12)) + WORDS // 2 * upper]
            many = (upper & (np.arange(12) < lengths[:, None])).sum(1) * 2 > lengths
            lines = (
                f"{' '.join(row[:n])},{int(label)}\n"
                for row, n, label in zip(chosen, lengths, many, strict=True)
            )
            file.writelines(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A tiny random BERT and short labelled texts.")
    parser.add_argument("folder", type=Path, help="where model/ and texts.csv go")
    parser.add_argument("examples", type=int, nargs="?", default=2_000_000, help="how many texts")
    args = parser.parse_args()
    make_model(args.folder / "model")
    make_texts(args.folder / "texts.csv", args.examples)
