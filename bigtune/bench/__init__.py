"""How fast a run is on this host: what `bigtune bench` measures, in real training runs."""
