"""The convergence theorem of FSLoRA against measurement: the quantities in it, estimated along a run."""
