"""Sharded checkpoints: one safetensors file a rank, one readable layout, merged into a model afterwards."""
