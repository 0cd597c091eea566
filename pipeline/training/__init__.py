"""Training: where pictures with masks come from, decoupled distillation, SAM's own training. No Ray."""
