"""The model card of an adapter folder: what it is, and code that runs as it stands."""

import json
from collections.abc import Sequence

from fslora_jax.adapters.schema import AdapterConfig
from fslora_jax.models import Naming

HEADER = """\
---
base_model: {base_model_json}
library_name: peft
tags: [lora, federated-learning]
---
# LoRA adapter of rank {r} for {base_model}

Trained with Federated Sketching LoRA (arXiv 2501.19389) by fslora_jax. """

CLASSIFIER = (
    HEADER
    + """A `{architecture}` with labels
{labels}; an example is classified by {pooling}.
{note}
```python
import torch
from peft import PeftModel
from transformers import AutoTokenizer, {auto_class}

labels = {labels}
base = {base_model_json}
model = {auto_class}.from_pretrained(base, num_labels=len(labels))
model = PeftModel.from_pretrained(model, "path/of/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(["The first text.", "Another one."], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    {logits}
print([labels[i] for i in logits.argmax(-1)])
```
"""
)

LANGUAGE_MODEL = (
    HEADER
    + """A `{architecture}`, which continues a text.

```python
from peft import PeftModel
from transformers import AutoTokenizer, {auto_class}

base = {base_model_json}
model = PeftModel.from_pretrained({auto_class}.from_pretrained(base), "path/of/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer("The first text.", return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**batch, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0]))
```
"""
)

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
POOLINGS = {
    "SEQ_CLS": ("the model's own sequence classifier", "", "logits = model(**batch).logits"),
    "TOKEN_CLS": (
        "a linear head on the mean of the token vectors",
        "\nThe head is linear, so the mean of tokens' logits over the attention mask is the text's logits."
        "\nIt is stored as a token classifier; the average follows it.\n",
        'mask = batch["attention_mask"][..., None]\n'
        "    logits = (model(**batch).logits * mask).sum(1) / mask.sum(1)",
    ),
    "CAUSAL_LM": ("", "", ""),
}
"""PEFT's task type -> how an example becomes a classifier's logits: in words, a note, and in code."""


def model_card(naming: Naming, config: AdapterConfig, label_names: Sequence[str]) -> str:
    """The text of ``README.md``."""
    pooling, note, logits = POOLINGS[naming.task_type]
    return (LANGUAGE_MODEL if naming.task_type == "CAUSAL_LM" else CLASSIFIER).format(
        base_model=config.base_model_name_or_path,
        base_model_json=json.dumps(config.base_model_name_or_path),
        auto_class=AUTO_CLASSES[naming.task_type],
        architecture=naming.architecture,
        labels=json.dumps(list(label_names)),
        pooling=pooling,
        note=note,
        logits=logits,
        r=config.r,
    )
