"""Symbol decisions for denoisers, read from `rules/symbols/diffusers.yaml`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from porter.resources import table


class Policy(Struct, frozen=True):
    """Prefixes copied and imported, forward parameters refused, calls with a known outcome."""

    copied: tuple[str, ...]
    imported: tuple[str, ...]
    refused: frozenset[str]
    outcomes: dict[str, bool]
    constants: dict[str, bool]
    rules: Path

    def hinted(self, name: str) -> Policy:
        """The policy for one class, with its hint if `rules/models` has one."""
        path = self.rules / "models" / f"{name}.yaml"
        if not path.is_file():
            return self
        hint = table(path)
        return replace(self, refused=self.refused - set(hint.get("keep_parameters", ())),
                       outcomes={**self.outcomes, **hint.get("outcomes", {})})  # fmt: skip

    def copies(self, name: str) -> bool:
        """Whether a symbol is copied; the longest matching prefix decides."""
        best = max((p for p in (*self.copied, *self.imported) if name.startswith(p)), key=len, default="")
        return best in self.copied

    def imports(self, name: str) -> bool:
        """Whether a symbol is listed as imported."""
        return any(name.startswith(p) for p in self.imported) and not self.copies(name)


@lru_cache(maxsize=8)
def load_policy(rules: Path) -> Policy:
    """Read the table below a rule directory."""
    data = table(rules / "symbols" / "diffusers.yaml", "copy", "import", "refuse", "outcomes", "constants")
    return Policy(
        tuple(data["copy"]),
        tuple(data["import"]),
        frozenset(data["refuse"]),
        dict(data["outcomes"]),
        dict(data["constants"]),
        rules,
    )
