"""Pre-training objectives: a batch in, ``{"loss": ...}`` and its named parts out."""
