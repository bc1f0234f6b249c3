"""Packages that a pipeline insists on and that nobody installs for a test: classes that pass everything through.

A pipeline's file names them (`stand_ins: {package: [Class]}`); they are noted in the checkpoint, so that every process
that loads it, on either side, has them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "stand_ins.json"


class PassThrough:
    """Every method returns its first argument."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda value=None, *args, **kwargs: value


def note(checkpoint: Path | str, wanted: Mapping[str, Sequence[str]]) -> None:
    """Write into a checkpoint's folder what has to stand in when it is loaded."""
    if wanted:
        (Path(checkpoint) / FILE).write_text(json.dumps(dict(wanted)))


def provide(wanted: Mapping[str, Sequence[str]]) -> None:
    """Make the packages importable, and known to Diffusers as installed."""
    from diffusers.utils import import_utils

    for package, classes in wanted.items():
        if package not in sys.modules and importlib.util.find_spec(package) is not None:
            continue  # the package itself is there
        module = types.ModuleType(package)
        module.__spec__ = importlib.machinery.ModuleSpec(package, None)
        for name in classes:
            setattr(module, name, type(name, (PassThrough,), {"__module__": package}))
        sys.modules.setdefault(package, module)
        setattr(import_utils, f"_{package}_available", True)


def provide_noted(checkpoint: Path | str) -> None:
    """`provide` what the checkpoint's folder notes."""
    file = Path(checkpoint) / FILE
    if file.is_file():
        provide(json.loads(file.read_text()))
