"""Training: one exact optimizer step after another, on DeepSpeed ZeRO-3."""
