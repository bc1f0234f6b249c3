"""What a run found, as one JSON file that is written after every step: an interrupted run keeps what it has."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.emit.write import write_atomically
from porter.verify.outcome import VerifyError

SCHEMA = 1


class Record:
    """The growing result. Sides write from threads of their own, each below its own key."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            **head,
            "ceilings": {},
            "denoisers": {},
            "requests": {},
            "problems": [],
        }
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

    def request(self, pipeline: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a pipeline's whole requests."""
        row = self.data["requests"].setdefault(pipeline, {"sides": {}, "agreement": {}})
        row |= facts
        return row

    def request_side(self, pipeline: str, side: str) -> dict[str, Any]:
        sides = self.data["requests"][pipeline]["sides"]
        return sides.setdefault(side, {"facts": {}, "runs": {}, "rounds": {}, "compiled": {}, "failures": []})

    def problem(self, where: str, message: str) -> None:
        """One clear message about something that did not run."""
        with self._lock:
            self.data["problems"].append({"where": where, "message": message})

    def write(self) -> None:
        with self._lock:
            self.data["seconds"] = round(time.perf_counter() - self._start, 1)
            text = json.dumps(self.data, indent=1, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically({self.path.name: text}, self.path.parent)


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
    """Several results as one. What differs in layers, configuration or device is kept apart, under a longer name; a run
    on one card and a run on two of the same workload are joined; otherwise the later run of a workload replaces it. A
    later run also replaces one in which no port ran, with its problems, whatever its workload was (on the same device, or
    where a port ran at last). Modes of two cards that a later run left out stay.

    Every denoiser keeps the ceilings and the device of its own run. `commands` and `machines` list what was run where.
    """
    whole = dict(results[0], denoisers={}, requests={}, problems=[])
    whole["machines"] = [
        {k: r[k] for k in ("device", "versions", "when", "ceilings", "links", "command") if k in r} for r in results
    ]
    whole["commands"] = list(dict.fromkeys(r["command"] for r in results))
    for result in results:
        device = result["device"].get("name") or "CPU"
        for name, row in result["denoisers"].items():
            own = {**row, "ceilings": result["ceilings"], "device": device, "parallel": _with_case(row)}
            _drop_failed(whole, name, own)
            key = _key(whole["denoisers"], name, own)
            old = whole["denoisers"].get(key)
            whole["denoisers"][key] = own if old is None else _joined(old, own)
        for name, row in result.get("requests", {}).items():
            own = {**row, "device": device}
            whole["requests"][_key(whole["requests"], name, own)] = own
        whole["problems"] = [*whole["problems"], *result["problems"]]
    return whole


def _with_case(row: Mapping[str, Any]) -> dict[str, Any]:
    """The modes of two cards, each with the case that it ran: rows that are joined may have other cases."""
    first = next(iter(row["cases"]), None)
    return {s: {m: {"case": first, **found} for m, found in modes.items()} for s, modes in row["parallel"].items()}


def _drop_failed(whole: dict[str, Any], name: str, later: Mapping[str, Any]) -> None:
    """Forget a run of a denoiser on one card in which no port ran, because a later one follows: on the same card, or on
    another one where a port did run."""
    for key, row in list(whole["denoisers"].items()):
        again = row["device"] == later["device"] or _port_ran(later)
        if key.split(",")[0] == name and again and row["sides"] and not _port_ran(row):
            del whole["denoisers"][key]
            whole["problems"] = [p for p in whole["problems"] if p["where"].split()[0] != name]


def _port_ran(row: Mapping[str, Any]) -> bool:
    return any(side["runs"] for name, side in row["sides"].items() if name.startswith("port"))


def _key(rows: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> str:
    """The name, with layers and device where another workload has the plain name."""
    for key in (name, f"{name}, {row['size']}", f"{name}, {row['size']}, {row['device']}"):
        same = ("size", "config", "device")
        if key not in rows or all(rows[key][k] == row[k] for k in same):
            return key
    return key


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    if new["sides"] and not old["sides"]:
        old, new = new, old
    modes = {s: {**old["parallel"].get(s, {}), **found} for s, found in new["parallel"].items()}
    parallel = {**old["parallel"], **modes}
    if old["sides"] and not new["sides"]:  # one card, then two
        return {**old, "parallel": parallel}
    return {**old, **new, "parallel": parallel}
