"""LoRA adapters in and out: PEFT folders, merged models, and which modules of a model they adapt."""
