"""How ranks exchange what they learned. Nothing here knows a model; nothing here imports `hpc` or `models`."""
