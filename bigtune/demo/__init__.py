"""The story of instruction tuning in a few minutes on a laptop, on data made here."""
