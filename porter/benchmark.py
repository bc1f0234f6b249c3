"""How long a conversion takes, beside the least that any LibCST program needs: parsing and printing the same files.

    work      N conversions in this one process, nothing written
    libcst    N times `parse_module(text).code` over the source files that the conversion read, in turn with the former
    process   `porter convert` in N new processes: interpreter, import of LibCST, imports of porter, work; of many classes
              it divides the work among the processors it may use, `workers` of them
    command   `porter convert` as a user starts it, N times, in turn with `python -c "import libcst"`

All figures are medians of seconds; the ratios are medians of the N ratios. `process` looks into a run and is slower for it:
what is measured is imported at once, where the command imports what it needs and ends without tidying up.

A verification is split into imports and work, too; the figures are those of its own report.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from porter.emit.write import write_atomically
from porter.exits import OK
from porter.model import Diagnostic, PorterError
from porter.shares import processes

DISTRIBUTIONS = ("porter", "libcst", "ruff", "diffusers", "vllm-omni", "torch")

_PROCESS = """
import gc, json, resource, sys, time
start = time.perf_counter()
import libcst
parser = time.perf_counter()
gc.disable()  # as `porter.__main__` does
import porter.cli, porter.commands, porter.convert
imported = time.perf_counter()
code = porter.cli.main(sys.argv[2:])
end = time.perf_counter()
gc.freeze()
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
with open(sys.argv[1], "w") as stream:
    json.dump({"import_libcst": parser - start, "import_porter": imported - parser, "work": end - imported,
               "peak_mib": peak / 1024, "exit": code}, stream)
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one `porter convert` in a new process. `interpreter` is start and end of Python itself."""

    interpreter: float
    import_libcst: float
    import_porter: float
    work: float
    peak_mib: float

    @property
    def wall(self) -> float:
        return self.interpreter + self.import_libcst + self.import_porter + self.work


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures of one conversion. `files` and `lines` count the source that was read, `ratio` is work over libcst."""

    subject: str
    classes: int
    files: int
    lines: int
    work: float
    libcst: float
    ratio: float
    process: Parts
    command: float
    """Wall of the command, and that over the wall of a process that imports LibCST and nothing else."""
    command_over_import: float
    workers: int

    def to_json(self) -> dict[str, Any]:
        process = {**asdict(self.process), "wall": self.process.wall}
        figures = {**asdict(self), "process": process}
        return {key: _rounded(value) for key, value in figures.items()}


def run(
    classes: list[str],
    everything: bool,
    together: bool,
    repeats: int,
    verify: bool,
    json_file: Path | None,
    generated: Path,
    source: Path | None,
) -> int:
    """`porter benchmark`."""
    from porter.convert import all_names

    if bool(classes) == everything:
        raise PorterError(
            Diagnostic("PORT013", "name classes, or say --all", advice="for example: porter benchmark NAME")
        )
    measured: list[Measurement] = []
    subjects = {"all": all_names(source)} if everything else {name: [name] for name in classes}
    if together and classes:
        subjects = {f"{len(classes)} classes": classes}
    for subject, names in subjects.items():
        print(f"{subject}: {repeats} times", file=sys.stderr)
        measured.append(measure(subject, names, repeats, source))
    verified = [verification(name, generated) for name in classes] if verify else []
    print(table(measured, verified))
    if json_file is not None:
        write_atomically({json_file.name: report(measured, verified, repeats, command_line())}, json_file.parent)
    return OK


def measure(subject: str, names: Sequence[str], repeats: int = 5, source: Path | None = None) -> Measurement:
    """Convert `names` together, `repeats` times, and compare. Raises PorterError as a conversion does."""
    from porter.convert import convert

    files = files_read(lambda: convert(names, source), _root(source))
    texts = [path.read_text(encoding="utf-8") for path in files]
    pairs = [
        (_seconds(lambda: convert(names, source)), _seconds(lambda: _parse_and_print(texts))) for _ in range(repeats)
    ]
    work, libcst = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    lines = sum(text.count("\n") for text in texts)
    parts = process_parts(names, repeats, source)
    command, over_import = command_beside_import(names, repeats, source)
    workers = processes(len(names))
    return Measurement(
        subject, len(names), len(files), lines, work, libcst, ratio, parts, command, over_import, workers
    )


def files_read(action: Callable[[], object], root: Path) -> list[Path]:
    """Python files below `root` that `action` opens."""
    found: set[Path] = set()
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = Path(arguments[0])
            if path.suffix == ".py" and path.is_relative_to(root):
                found.add(path)

    sys.addaudithook(watch)  # it can't be taken away again, only put to rest
    try:
        action()
    finally:
        watching = False
    return sorted(found)


def command_beside_import(names: Sequence[str], repeats: int, source: Path | None = None) -> tuple[float, float]:
    """Median seconds of the command, and the median of its ratio to a process that only imports LibCST."""
    seconds: list[float] = []
    ratios: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="porter_benchmark_") as folder:
            command = [sys.executable, "-m", "porter", *_convert(names, Path(folder) / "ports", source)]
            seconds.append(_seconds(lambda: subprocess.run(command, capture_output=True, check=True)))  # noqa: B023
            least = _seconds(lambda: subprocess.run([sys.executable, "-c", "import libcst"], check=True))
            ratios.append(seconds[-1] / least)
    return statistics.median(seconds), statistics.median(ratios)


def _convert(names: Sequence[str], out: Path, source: Path | None) -> list[str]:
    command = ["convert", *names, "--out", str(out), "--threshold", "never"]
    return [*command, "--source", str(source)] if source else command


def process_parts(names: Sequence[str], repeats: int, source: Path | None = None) -> Parts:
    """Medians over runs of the command in new processes, each into an empty folder."""
    runs: list[Parts] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="porter_benchmark_") as folder:
            out, times = Path(folder) / "ports", Path(folder) / "times.json"
            command = _convert(names, out, source)
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", _PROCESS, str(times), *command], capture_output=True, check=True)
            wall = time.perf_counter() - begin
            inside = json.loads(times.read_text(encoding="utf-8"))
        imports = inside["import_libcst"], inside["import_porter"]
        runs.append(Parts(wall - sum(imports) - inside["work"], *imports, inside["work"], inside["peak_mib"]))
    return Parts(*(statistics.median(values) for values in zip(*(asdict(r).values() for r in runs), strict=True)))


def verification(name: str, generated: Path) -> dict[str, Any]:
    """Seconds of a verification, from the report of `porter verify`: wall, imports, and work of each rung."""
    with tempfile.TemporaryDirectory(prefix="porter_benchmark_") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "porter", "verify", name, "--out", str(generated), "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.is_file():
            raise RuntimeError(f"porter verify {name} wrote no report: {done.stderr.strip()[-500:]}")
        found = json.loads(report.read_text(encoding="utf-8"))
    return {"subject": name, "passed": found["passed"], "seconds": found["seconds"]}


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpus": str(os.cpu_count())}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(measured: Iterable[Measurement], verified: Iterable[dict[str, Any]], repeats: int, command: str) -> str:
    """The JSON of a run."""
    data = {
        "schema": 1,
        "command": command,
        "repeats": repeats,
        "versions": versions(),
        "convert": [m.to_json() for m in measured],
        "verify": list(verified),
    }
    return json.dumps(data, indent=2) + "\n"


def table(measured: Iterable[Measurement], verified: Iterable[dict[str, Any]]) -> str:
    """The same for a person: seconds. `ratio` is work over libcst, `x import` the command over a process that imports it."""
    head = ("convert", "files", "lines", "work", "libcst", "ratio", "command", "x import", "python", "libcst", "porter",
            "work", "workers", "MiB")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for m in measured:
        p = m.process
        seconds = [f"{s:.2f}" for s in (p.interpreter, p.import_libcst, p.import_porter, p.work)]
        rows.append((m.subject, str(m.files), str(m.lines), f"{m.work:.2f}", f"{m.libcst:.2f}", f"{m.ratio:.2f}",
                     f"{m.command:.2f}", f"{m.command_over_import:.1f}", *seconds, str(m.workers),
                     f"{p.peak_mib:.0f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    for each in verified:
        s = each["seconds"]
        work = sum(s["work"].values())
        state = "passed" if each["passed"] else "failed"
        lines.append(
            f"verify {each['subject']}: {state}; wall {s['wall']:.1f}, work {work:.1f},"
            f" imports {s['imports_summed_over_processes']:.1f} summed over processes"
        )
    return "\n".join(lines)


def command_line() -> str:
    """The command as it was given, without the folder of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _root(source: Path | None) -> Path:
    from porter.source.library import open_library

    return open_library(source).root


def _parse_and_print(texts: Iterable[str]) -> None:
    import libcst

    for text in texts:
        libcst.parse_module(text).code  # noqa: B018 - printing is the point


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value
