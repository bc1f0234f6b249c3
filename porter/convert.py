"""The story of a port: load -> resolve -> analyse -> plan -> apply -> close -> emit -> check.

Reads text only. Neither torch nor diffusers nor the engine is imported, and no code that is read is run.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from porter import resources
from porter.check.static import check_files
from porter.emit import linemap
from porter.emit.linemap import Finished
from porter.emit.record import port_record
from porter.emit.source_file import file_header, print_definitions
from porter.engine import RuleConflict, RuleSet, load_rules
from porter.evidence import read_evidence
from porter.halves import Helper
from porter.manifest import Manifest, PortEntry, manifest_text
from porter.model import Diagnostic, PorterError
from porter.pins import DIFFUSERS
from porter.pipeline import Denoiser, PipelinePort, port_pipeline
from porter.pipeline.registration import PortRow, folder_init, package_files
from porter.pipeline.tables import load_tables
from porter.shares import share_out
from porter.source.library import Library, open_library
from porter.targets import Target, all_targets, find_target
from porter.transformer.policy import Policy, load_policy
from porter.transformer.port import TransformerPort, port_name, port_transformer


class Conversion(Struct, frozen=True):
    """Everything a run wrote: files by path relative to the output folder, findings, and one row per port."""

    files: Mapping[str, str]
    diagnostics: tuple[Diagnostic, ...]
    ports: tuple[PortEntry, ...]
    edits_planned: int
    summary: tuple[tuple[str, ...], ...]


class Folders(Struct, frozen=True):
    """Folders of ports that one process printed. `found` are findings by position of the target they are about,
    `checked` those about printed files."""

    files: Mapping[str, str]
    ports: tuple[PortEntry, ...]
    edits_planned: int
    found: Mapping[int, tuple[Diagnostic, ...]]
    checked: tuple[Diagnostic, ...]


class Denoisers(Struct, frozen=True):
    """Denoisers of one target that another process converted, by qualified name: ports without their trees, files without
    Python's trees of them, and what was found in the files."""

    ports: Mapping[str, TransformerPort]
    files: Mapping[str, Finished]
    checked: tuple[Diagnostic, ...]


def convert(
    names: Sequence[str],
    source: Path | None = None,
    rules_dir: Path | None = None,
    evidence: Path | None = None,
    processes: int = 1,
    helper: Helper | None = None,
) -> Conversion:
    """Port pipelines (or denoisers alone) given by class name, in so many processes at once; it changes no byte. A `helper`
    is at work on the denoisers of the only target.

    Raises PorterError when nothing can be converted.
    """
    library = open_library(source)
    targets = [find_target(library, name) for name in names]
    shares = share_out(targets, processes)
    if len(shares) == 1:
        parts = [_folders(dict(enumerate(targets)), library, rules_dir, evidence, alone=len(names) == 1, helper=helper)]
    else:
        parts = _side_by_side([{n: targets[n] for n in share} for share in shares], source, rules_dir, evidence)
    if not any(part.ports for part in parts):
        raise PorterError(*(d for part in parts for each in part.found.values() for d in each))
    return _joined(parts, library.version)


def _side_by_side(
    shares: Sequence[Mapping[int, Target]], source: Path | None, rules_dir: Path | None, evidence: Path | None
) -> list[Folders]:
    """Each share in a process of its own. If one fails, or the user interrupts, the others end at once."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from porter.interrupts import leave_interrupts_to_the_parent, uninterrupted

    with ProcessPoolExecutor(len(shares), initializer=leave_interrupts_to_the_parent) as pool:
        try:
            with uninterrupted():
                jobs = [pool.submit(_share, share, source, rules_dir, evidence) for share in shares]
            return [job.result() for job in jobs]
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _share(
    targets: Mapping[int, Target], source: Path | None, rules_dir: Path | None, evidence: Path | None
) -> Folders:
    """The part of a conversion that another process does."""
    return _folders(targets, open_library(source), rules_dir, evidence, alone=False)


def convert_denoisers(name: str, source: Path | None, rules_dir: Path | None) -> Denoisers | PorterError | None:
    """The denoisers of a pipeline, or why they can't be ported; None if `name` is no pipeline."""
    with _no_search_for_cycles():
        library = open_library(source)
        target = find_target(library, name)
        if not target.is_pipeline:
            return None
        run = _Conversion(library, load_rules(rules_dir or resources.RULES), load_policy(resources.RULES))
        try:
            for qualified in target.denoisers.values():
                run.transformer(qualified)
        except PorterError as error:
            return error
        run.print_transformers(rules_digest(rules_dir))
    ports = {name: replace(port, definitions=()) for name, port in run.transformers.items()}
    return Denoisers(ports, {n: replace(f, tree=None) for n, f in run.finished.items()}, tuple(run.checked))


def _folders(
    targets: Mapping[int, Target], library: Library, rules_dir: Path | None, evidence: Path | None, *, alone: bool,
    helper: Helper | None = None,
) -> Folders:  # fmt: skip
    with _no_search_for_cycles():
        load_tables()  # what is wrong with them ends the run here, and not one pipeline after the other
        run = _Conversion(library, load_rules(rules_dir or resources.RULES), load_policy(resources.RULES), helper)
        found: dict[int, tuple[Diagnostic, ...]] = {}
        for position, target in targets.items():
            before = len(run.diagnostics)
            run.add(target, alone=alone)
            found[position] = tuple(run.diagnostics[before:])
        return run.finish(evidence, found, rules_digest(rules_dir))


def _joined(parts: Sequence[Folders], version: str) -> Conversion:
    """One conversion: all folders and the files around them."""
    files = {name: text for part in parts for name, text in part.files.items()}
    if len(files) < sum(len(part.files) for part in parts):
        raise RuntimeError("two processes printed the same file")
    entries = sorted((e for part in parts for e in part.ports), key=lambda e: (e.folder, e.arch))
    folders = {name.partition("/")[0] for name in files}
    files |= package_files(folders, "0.1.0")
    files["manifest.json"] = manifest_text(Manifest(version, tuple(entries)))
    found = dict(sorted((n, d) for part in parts for n, d in part.found.items()))
    checked = sorted(
        (d for part in parts for d in part.checked), key=lambda d: (d.span.file, d.span.line) if d.span else ("", 0)
    )
    return Conversion(
        dict(sorted(files.items())), (*_version(version), *(d for each in found.values() for d in each), *checked),
        tuple(entries), sum(part.edits_planned for part in parts), _summary(entries, files),
    )  # fmt: skip


def _version(version: str) -> tuple[Diagnostic, ...]:
    """What is to be said of a source of another version than the rules are written for."""
    wanted = " ".join(DIFFUSERS)
    if version == DIFFUSERS[1]:
        return ()
    return (Diagnostic("PORT006", f"the source is Diffusers {version}, the rules are written for {wanted}"),)


def _summary(entries: Sequence[PortEntry], files: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for e in entries:
        size = sum(files[f"{e.folder}/{m}.py"].count("\n") for m in e.modules())
        rows.append((e.source, f"{e.folder}/", e.cls or "transformer only", f"{size} lines"))
    return tuple(rows)


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Trees and facts live until the port is printed, and trees hold no cycles: searching them costs a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def all_names(source: Path | None = None) -> list[str]:
    """Every pipeline whose denoiser is a transformer, by public name."""
    return [f"diffusers.{t.name}" for t in all_targets(open_library(source))]


class _Conversion:
    """Ports collected over several targets; denoisers shared by pipelines are converted once."""

    def __init__(self, library: Library, rules: RuleSet, policy: Policy, helper: Helper | None = None) -> None:
        self.library = library
        self.rules = rules
        self.policy = policy
        self.helper = helper
        self.transformers: dict[str, TransformerPort] = {}
        self.pipelines: dict[str, tuple[str, PipelinePort]] = {}
        self.alone: dict[str, Target] = {}
        self.blocked: dict[str, Diagnostic] = {}
        self.diagnostics: list[Diagnostic] = []
        self.finished: dict[str, Finished] = {}
        self.checked: list[Diagnostic] = []

    def add(self, target: Target, *, alone: bool) -> None:
        """Convert one target: its denoisers first, then the pipeline around them.

        Raises PorterError when a denoiser can't be ported and the target was asked for `alone`; among others it is
        left out, with its diagnostics.
        """
        expected = {c: Denoiser(c, *port_name(self.library, q)) for c, q in target.denoisers.items()}
        # While a helper converts the denoisers, the pipeline comes first: what they will be called is known.
        early = self._pipeline(target, expected) if target.is_pipeline and self.helper is not None else None
        try:
            ported = {c: self.transformer(q) for c, q in target.denoisers.items()}
        except PorterError as error:
            if alone:
                raise
            self.diagnostics += error.diagnostics
            return
        denoisers = {c: Denoiser(c, p.source, p.module, p.class_name) for c, p in ported.items()}
        folder = self.transformer(next(iter(target.denoisers.values()))).folder
        if target.is_pipeline:
            pipeline = early if early is not None and denoisers == expected else self._pipeline(target, denoisers)
            if isinstance(pipeline, PorterError):
                if alone and isinstance(pipeline, RuleConflict):
                    raise pipeline
                # A transformer that converts is worth having before its pipeline does.
                self.diagnostics += pipeline.diagnostics
                self.blocked[target.name] = pipeline.diagnostics[0]
            else:
                self.pipelines[target.name] = (folder, pipeline)
                self.diagnostics += pipeline.diagnostics
                return
        self.alone[target.name] = target

    def _pipeline(self, target: Target, denoisers: dict[str, Denoiser]) -> PipelinePort | PorterError:
        """The port of a pipeline, or why there is none (PORT005 when its loop calls something that is no transformer)."""
        try:
            pipeline = port_pipeline(self.library, target.qualified, denoisers, self.rules)
        except PorterError as error:
            return error
        ported = {d.source for d in denoisers.values()}
        if others := sorted(f"{d.component} is a {d.source}" for d in pipeline.denoisers if d.source not in ported):
            where = self.library.span(target.qualified)
            return PorterError(Diagnostic("PORT005", f"{target.name}: {', '.join(others)}", where))
        return pipeline

    def transformer(self, qualified: str) -> TransformerPort:
        """The port of a denoiser. Raises PorterError if there can be none."""
        if qualified not in self.transformers and self.helper is not None:
            helper, self.helper = self.helper, None
            made = helper.answer()
            if isinstance(made, PorterError):
                raise made
            if made is not None:
                self.transformers.update(made.ports)
                self.finished.update(made.files)
                self.checked += made.checked
                self.diagnostics += [d for port in made.ports.values() for d in port.diagnostics]
        if qualified not in self.transformers:
            port = port_transformer(self.library, qualified, self.rules, self.policy)
            self.transformers[qualified] = port
            self.diagnostics += port.diagnostics
        return self.transformers[qualified]

    def print_transformers(self, digest: str) -> None:
        """Print, format and check the files of denoisers, as far as another process has not done so."""
        self._print(self._marked_transformers(digest))

    def finish(self, evidence: Path | None, found: Mapping[int, tuple[Diagnostic, ...]], digest: str) -> Folders:
        """Print, format and check all files, which name the `digest` of the rules; write the records of their folders."""
        marked = self._marked_transformers(digest)
        for folder, pipeline in self.pipelines.values():
            local = {f"{d.module}.{d.name}": d.name for d in pipeline.unit.definitions}
            marked[f"{folder}/{pipeline.module}.py"] = print_definitions(
                pipeline.unit.definitions, local, self._header(pipeline.source, pipeline.source, digest)
            )
        self._print(marked)
        files = {name: f.text for name, f in self.finished.items()}
        entries = self._entries(files, evidence)
        folders = sorted({p.folder for p in self.transformers.values()})
        files.update(linemap.format_files({f"{folder}/__init__.py": self._init(folder, entries) for folder in folders}))
        for folder in folders:
            files[f"{folder}/port.json"] = port_record(folder, self, self.finished)
        edits = sum(p.edits for p in self.transformers.values())
        return Folders(files, tuple(entries), edits, found, tuple(self.checked))

    def _marked_transformers(self, digest: str) -> dict[str, str]:
        """Marked texts of the denoisers that are not printed yet, by file."""
        ports = {f"{p.folder}/{p.module}.py": p for p in self.transformers.values()}
        return {
            name: print_definitions(
                port.definitions, port.local, self._header(f"diffusers.{port.class_name}", port.source, digest)
            )
            for name, port in ports.items()
            if name not in self.finished
        }

    def _print(self, marked: Mapping[str, str]) -> None:
        finished = linemap.finish(marked)
        self.checked += check_files({name: f.tree or f.text for name, f in finished.items()})
        self.finished.update(finished)

    def _header(self, public: str, qualified: str, digest: str) -> str:
        span = self.library.span(qualified)
        return file_header(public, span.file if span else "", self.library.version, digest)

    def _entries(self, files: Mapping[str, str], evidence: Path | None) -> list[PortEntry]:
        proven = read_evidence(evidence)
        entries = [PortEntry.of_pipeline(folder, p, self.transformers, files, proven)
                   for folder, p in self.pipelines.values()]  # fmt: skip
        covered = {d["source"] for e in entries for d in e.denoisers.values()}
        for target in self.alone.values():
            qualified = set(target.denoisers.values())
            if target.is_pipeline or not {self.transformers[q].source for q in qualified} <= covered:
                blocked = self.blocked.get(target.name)
                entries.append(PortEntry.of_target(target, self.transformers, files, proven, blocked))
        return sorted(entries, key=lambda e: (e.folder, e.arch))

    def _init(self, folder: str, entries: list[PortEntry]) -> str:
        transformers = [(t.module, t.class_name) for t in self.transformers.values() if t.folder == folder]
        rows = [PortRow(e.arch, e.folder, e.module, e.cls, e.pre_process, e.post_process)
                for e in entries if e.folder == folder]  # fmt: skip
        return folder_init(folder, transformers, rows)


def rules_digest(rules: Path | None = None) -> str:
    """Twelve digits that change when a rule, a symbol table or a template changes; `rules` is a folder of other rules."""
    total = hashlib.sha256()
    roots = (resources.RULES, resources.TEMPLATES)
    for root in roots if rules is None else (*roots, rules):
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in (".yaml", ".jinja"):
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]
