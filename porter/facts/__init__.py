"""Analyses: one fact per file, pure functions from source to frozen values."""

from __future__ import annotations


def load() -> None:
    """Import the modules that register facts for rules."""
    import porter.facts.block_loops
    import porter.facts.complex_rotation
    import porter.facts.device_tables
    import porter.facts.key_bias
    import porter.facts.layers
    import porter.facts.masks
    import porter.facts.normed_rotation
    import porter.facts.sequence.sites
    import porter.facts.unpadded_masks  # noqa: F401
