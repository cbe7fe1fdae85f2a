"""How well a model follows instructions: held-out loss and exact match, by task."""
