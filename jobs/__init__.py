"""How work reaches a machine."""
