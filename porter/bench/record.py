"""What a run found, as one JSON file that is written after every step: an interrupted run keeps what it has."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.verify.manifest import write_atomically
from porter.verify.outcome import VerifyError

SCHEMA = 1


class Record:
    """The growing result. Sides write from threads of their own, each below its own key."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, **head, "ceilings": {}, "denoisers": {}, "problems": []}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    def denoiser(self, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        row = self.data["denoisers"].setdefault(name, {"sides": {}, "counts": {}, "agreement": {}, "parallel": {}})
        row |= facts
        return row

    def side(self, denoiser: str, side: str) -> dict[str, Any]:
        sides = self.data["denoisers"][denoiser]["sides"]
        with self._lock:
            return sides.setdefault(
                side, {"facts": {}, "runs": {}, "rounds": {}, "profiles": {}, "compiled": {}, "failures": []}
            )

    def problem(self, where: str, message: str) -> None:
        """One clear message about something that did not run."""
        with self._lock:
            self.data["problems"].append({"where": where, "message": message})

    def write(self) -> None:
        with self._lock:
            self.data["seconds"] = round(time.perf_counter() - self._start, 1)
            text = json.dumps(self.data, indent=1, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises VerifyError when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VerifyError(f"{path} can't be read: {error.strerror}", "give a file that porter bench wrote") from None
    except ValueError as error:
        raise VerifyError(f"{path} is no JSON: {error}", "give a file that porter bench wrote") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "denoisers" not in data:
        raise VerifyError(f"{path} is no result of porter bench", f"schema {SCHEMA} is needed")
    return data


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one: a later file adds its denoisers; of one denoiser in two files the parts are joined.

    Joined sides must come from one device: raises VerifyError otherwise.
    """
    whole = dict(results[0], denoisers={}, problems=[])
    whole["commands"] = [r["command"] for r in results]
    origin: dict[str, str] = {}
    for result in results:
        device = result["device"].get("name", "cpu")
        whole["problems"] = [*whole["problems"], *result["problems"]]
        whole["ceilings"] = whole["ceilings"] or result["ceilings"]
        for name, row in result["denoisers"].items():
            old = whole["denoisers"].get(name)
            if old is None:
                whole["denoisers"][name], origin[name] = {**row, "device": device}, device
                continue
            if origin[name] != device:
                raise VerifyError(f"{name} was measured on {origin[name]} and on {device}", "report them apart")
            for part in ("sides", "counts", "agreement", "parallel"):
                old[part] = {**old[part], **row[part]}
    return whole
