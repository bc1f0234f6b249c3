"""The story of a port: load -> resolve -> analyse -> plan -> apply -> close -> emit -> check.

Reads text only. Neither torch nor diffusers nor the engine is imported, and no code that is read is run.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from porter.halves import beside
from porter.manifest import Manifest, PortEntry, manifest_text
from porter.model import Diagnostic, PorterError, Unit
from porter.pins import DIFFUSERS
from porter.pipeline import Denoiser, PipelinePort
from porter.pipeline.registration import PortRow, folder_init, package_files
from porter.pipeline.tables import load_tables
from porter.shares import share_out
from porter.shipment import Shipment, shipped
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


class Around(Struct, frozen=True):
    """A pipeline that another process ported and printed: the port without its trees, the files without Python's trees of
    them, and what was found in the files."""

    port: PipelinePort
    files: Mapping[str, Finished]
    checked: tuple[Diagnostic, ...]
    formatted: Mapping[str, str]
    """Texts of `__init__.py` before and after formatting."""


def convert(
    names: Sequence[str],
    source: Path | None = None,
    rules_dir: Path | None = None,
    evidence: Path | None = None,
    processes: int = 1,
) -> Conversion:
    """Port pipelines (or denoisers alone) given by class name, in so many processes at once; it changes no byte.

    Raises PorterError when nothing can be converted.
    """
    library = open_library(source)
    targets = [find_target(library, name) for name in names]
    shares = share_out(targets, processes)
    if len(shares) == 1:
        alone = len(names) == 1
        only = dict(enumerate(targets))
        parts = [_folders(only, library, rules_dir, evidence, alone=alone, halves=alone and processes > 1)]
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


def _folders(
    targets: Mapping[int, Target], library: Library, rules_dir: Path | None, evidence: Path | None, *, alone: bool,
    halves: bool = False,
) -> Folders:  # fmt: skip
    with _no_search_for_cycles():
        load_tables()  # what is wrong with them ends the run here, and not one pipeline after the other
        digest = rules_digest(rules_dir)
        rules = load_rules(rules_dir or resources.RULES)
        run = _Conversion(library, rules, load_policy(resources.RULES), digest if halves else None)
        found: dict[int, tuple[Diagnostic, ...]] = {}
        for position, target in targets.items():
            before = len(run.diagnostics)
            run.add(target, alone=alone)
            found[position] = tuple(run.diagnostics[before:])
        return run.finish(evidence, found, digest)


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
    """Ports collected over several targets; denoisers shared by pipelines are converted once. With a `digest` of the rules,
    which files name, a pipeline is ported and printed beside its denoisers."""

    def __init__(self, library: Library, rules: RuleSet, policy: Policy, digest: str | None = None) -> None:
        self.library = library
        self.rules = rules
        self.policy = policy
        self.digest = digest
        self.transformers: dict[str, TransformerPort] = {}
        self.pipelines: dict[str, tuple[str, PipelinePort]] = {}
        self.alone: dict[str, Target] = {}
        self.blocked: dict[str, Diagnostic] = {}
        self.diagnostics: list[Diagnostic] = []
        self.finished: dict[str, Finished] = {}
        self.checked: list[Diagnostic] = []
        self.formatted: dict[str, str] = {}

    def add(self, target: Target, *, alone: bool) -> None:
        """Convert one target: its denoisers first, then the pipeline around them.

        Raises PorterError when a denoiser can't be ported and the target was asked for `alone`; among others it is
        left out, with its diagnostics.
        """
        with self._around(target) as around:
            try:
                ported = {c: self._transformer(q) for c, q in target.denoisers.items()}
            except PorterError as error:
                if alone:
                    raise
                self.diagnostics += error.diagnostics
                return
            denoisers = {c: Denoiser(c, p.source, p.module, p.class_name) for c, p in ported.items()}
            folder = self._transformer(next(iter(target.denoisers.values()))).folder
            if target.is_pipeline:
                try:
                    pipeline = around(denoisers)
                except PorterError as error:
                    if alone and isinstance(error, RuleConflict):
                        raise
                    # A transformer that converts is worth having before its pipeline does.
                    self.diagnostics += error.diagnostics
                    self.blocked[target.name] = error.diagnostics[0]
                else:
                    self.pipelines[target.name] = (folder, pipeline)
                    self.diagnostics += pipeline.diagnostics
                    return
            self.alone[target.name] = target

    @contextmanager
    def _around(self, target: Target) -> Iterator[Callable[[Mapping[str, Denoiser]], PipelinePort]]:
        """A function that gives the port of a target's pipeline; it may be at work in another process meanwhile, which takes
        for granted what the denoisers will be called."""
        if self.digest is None or not target.is_pipeline:
            yield lambda denoisers: self._pipeline(target, denoisers)
            return
        expected = {c: Denoiser(c, *port_name(self.library, q)) for c, q in target.denoisers.items()}
        digest = self.digest
        with beside(
            lambda: self._printed_pipeline(target, expected, digest), lambda: shipped(self.library, target)
        ) as other:
            self.library.given = Shipment(other.sent_ahead).definition

            def pipeline(denoisers: Mapping[str, Denoiser]) -> PipelinePort:
                made = other.result() if denoisers == expected else None
                if made is None:
                    return self._pipeline(target, denoisers)
                self.finished.update(made.files)
                self.checked += made.checked
                self.formatted.update(made.formatted)
                return made.port

            yield pipeline

    def _printed_pipeline(self, target: Target, denoisers: Mapping[str, Denoiser], digest: str) -> Around | None:
        """The pipeline's half of a conversion; None if there is no pipeline, and why is then to be found out again."""
        try:
            port = self._pipeline(target, denoisers)
        except PorterError:
            return None
        run = _Conversion(self.library, self.rules, self.policy)
        folder = next(iter(denoisers.values())).module.removesuffix("_transformer")
        run._print({f"{folder}/{port.module}.py": self._marked(port, digest)})
        files = {name: replace(f, tree=None) for name, f in run.finished.items()}
        row = PortRow(port.arch, folder, port.module, port.cls, port.pre_process, port.post_process)
        init = folder_init(folder, {(d.module, d.cls) for d in denoisers.values()}, [row])
        run._format({f"{folder}/__init__.py": init})
        return Around(replace(port, unit=Unit((), port.cls)), files, tuple(run.checked), run.formatted)

    def _pipeline(self, target: Target, denoisers: Mapping[str, Denoiser]) -> PipelinePort:
        """The port of a pipeline. Raises PorterError (PORT005 when its loop calls something that is no transformer)."""
        from porter.pipeline import port_pipeline  # in the process that needs it

        pipeline = port_pipeline(self.library, target.qualified, denoisers, self.rules)
        ported = {d.source for d in denoisers.values()}
        if others := sorted(f"{d.component} is a {d.source}" for d in pipeline.denoisers if d.source not in ported):
            where = self.library.span(target.qualified)
            raise PorterError(Diagnostic("PORT005", f"{target.name}: {', '.join(others)}", where))
        return pipeline

    def _transformer(self, qualified: str) -> TransformerPort:
        if qualified not in self.transformers:
            port = port_transformer(self.library, qualified, self.rules, self.policy)
            self.transformers[qualified] = port
            self.diagnostics += port.diagnostics
        return self.transformers[qualified]

    def finish(self, evidence: Path | None, found: Mapping[int, tuple[Diagnostic, ...]], digest: str) -> Folders:
        """Print, format and check all files, which name the `digest` of the rules; write the records of their folders."""
        marked: dict[str, str] = {}
        for port in self.transformers.values():
            marked[f"{port.folder}/{port.module}.py"] = print_definitions(
                port.definitions, port.local, self._header(f"diffusers.{port.class_name}", port.source, digest)
            )
        for folder, pipeline in self.pipelines.values():
            if (name := f"{folder}/{pipeline.module}.py") not in self.finished:
                marked[name] = self._marked(pipeline, digest)
        self._print(marked)
        files = {name: f.text for name, f in self.finished.items()}
        entries = self._entries(files, evidence)
        folders = sorted({p.folder for p in self.transformers.values()})
        files.update(self._format({f"{folder}/__init__.py": self._init(folder, entries) for folder in folders}))
        for folder in folders:
            files[f"{folder}/port.json"] = port_record(folder, self, self.finished)
        edits = sum(p.edits for p in self.transformers.values())
        return Folders(files, tuple(entries), edits, found, tuple(self.checked))

    def _marked(self, pipeline: PipelinePort, digest: str) -> str:
        local = {f"{d.module}.{d.name}": d.name for d in pipeline.unit.definitions}
        header = self._header(pipeline.source, pipeline.source, digest)
        return print_definitions(pipeline.unit.definitions, local, header)

    def _print(self, marked: Mapping[str, str]) -> None:
        finished = linemap.finish(marked)
        self.checked += check_files({name: f.tree or f.text for name, f in finished.items()})
        self.finished.update(finished)

    def _format(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Formatted texts by file; what was formatted before is not formatted again."""
        new = linemap.format_files({name: text for name, text in texts.items() if text not in self.formatted})
        self.formatted.update({texts[name]: text for name, text in new.items()})
        return {name: self.formatted[text] for name, text in texts.items()}

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
