"""Rules: loading, matching, planning, applying. The door is `load_rules` and `run_rules`; see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porter.engine.load import RuleSet, load_rules
    from porter.engine.run import Outcome, RuleConflict, refuse_conflicts, run_rules

__all__ = ["Outcome", "RuleConflict", "RuleSet", "load_rules", "refuse_conflicts", "run_rules"]


def __getattr__(name: str) -> object:
    """Lazy: importing the package must not import LibCST."""
    import importlib

    if name not in __all__:
        raise AttributeError(name)
    home = "load" if name in ("load_rules", "RuleSet") else "run"
    return getattr(importlib.import_module(f"porter.engine.{home}"), name)
