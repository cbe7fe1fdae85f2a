"""From raw instruction files to batches: formats → chat → store → plan → stream."""
