"""The model: read from shards, attention over packed documents, and the loss head."""
