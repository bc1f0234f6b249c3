"""Rules: loading, matching, planning, applying. The door is `load_rules` and `run_rules`; see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porter.engine.load import RuleSet, load_rules
    from porter.engine.run import Outcome, run_rules

__all__ = ["Outcome", "RuleSet", "load_rules", "run_rules"]


def __getattr__(name: str) -> object:
    """Lazy: importing the package must not import LibCST."""
    import importlib

    homes = {"load_rules": "load", "RuleSet": "load", "run_rules": "run", "Outcome": "run"}
    if name not in homes:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"porter.engine.{homes[name]}"), name)
