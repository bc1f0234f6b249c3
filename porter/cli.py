"""The command line. Each command parses its options and calls one function; imports are lazy, so `--help` is quick.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 ok, 1 generated files differ (`check`), 2 usage or
environment, 3 diagnostics at or above --threshold, 4 rule examples failed, 5 verification failed, 70 internal error,
130 interrupted.
"""

from __future__ import annotations

import sys
from copy import copy
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from porter.exits import EXAMPLES, INTERNAL, INTERRUPTED, OK, USAGE, interrupted
from porter.resources import CORPUS
from porter.verify.outcome import Again

app = typer.Typer(
    name="porter",
    help="Compile a Diffusers pipeline into a vLLM-Omni port.",
    epilog="Exit: 0 ok, 1 drift, 2 usage, 3 findings, 4 rule examples, 5 verification, 70 internal, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
rules_app = typer.Typer(help="List, show, test and start rules.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rules_app, name="rules")


class Format(StrEnum):
    rich = "rich"
    json = "json"
    sarif = "sarif"
    github = "github"


class Threshold(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"
    never = "never"


Source = Annotated[Path | None, typer.Option(help="Diffusers checkout or package (default: the installed one).")]
Rules = Annotated[Path | None, typer.Option("--rules", help="Folder of rules (default: the project's).")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the generated package.")]
FormatOption = Annotated[Format, typer.Option("--format", help="How diagnostics are printed.")]
Evidence = Annotated[Path | None, typer.Option(help="Results of verify that the manifest cites.")]
EVIDENCE = CORPUS / "evidence.json"
ThresholdOption = Annotated[Threshold, typer.Option(help="Exit with 3 for diagnostics of this effort or more.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback for internal errors.")] = False,
) -> None:
    if version:
        from porter import __version__

        print(f"porter {__version__}")
        raise typer.Exit(OK)


@app.command()
def convert(
    classes: Annotated[list[str] | None, typer.Argument(metavar="CLASS...", help="Pipelines or denoisers.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every class that Diffusers has.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show what would change; write nothing.")] = False,
    out: Out = Path("generated"),
    source: Source = None,
    rules: Rules = None,
    fmt: FormatOption = Format.rich,
    threshold: ThresholdOption = Threshold.high,
    evidence: Evidence = EVIDENCE,
) -> None:
    """Write the ports of classes."""
    from porter.commands import convert as run

    raise typer.Exit(run(classes or [], everything, diff, out, source, rules, fmt.value, threshold.value, evidence))


@app.command()
def check(
    out: Annotated[Path, typer.Option("--out", help="Folder of the generated package.")] = Path("generated"),
    source: Source = None,
    rules: Rules = None,
    fmt: FormatOption = Format.rich,
    evidence: Evidence = EVIDENCE,
) -> None:
    """Regenerate all ports in memory and compare; 1 if a file differs."""
    from porter.commands import check as run

    raise typer.Exit(run(out, source, rules, fmt.value, evidence))


@app.command()
def analyze(
    classes: Annotated[list[str], typer.Argument(metavar="CLASS...")],
    source: Source = None,
    rules: Rules = None,
    fmt: FormatOption = Format.rich,
) -> None:
    """Say what would be hard about porting a class; writes nothing."""
    from porter.commands import analyze as run

    raise typer.Exit(run(classes, source, rules, fmt.value))


@app.command()
def verify(
    classes: Annotated[
        list[str] | None, typer.Argument(metavar="CLASS...", help="Pipelines or denoisers with a port.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every port of the folder, as one sweep.")] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what the evidence says nothing about, of the classes or of all.")
    ] = False,
    again: Annotated[
        Again | None, typer.Option(help="Sweep: what runs although there is evidence (default: what is not proven).")
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="Comma-separated rungs (default: all; a sweep leaves out serve).")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A real checkpoint instead of a tiny random one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
    out: Out = Path("generated"),
    device: Annotated[str, typer.Option(help="cpu: the ladder; cuda: bfloat16 at real layer sizes.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    limit: Annotated[float, typer.Option(help="Sweep: seconds that one class may take.")] = 300.0,
    record: Annotated[
        bool, typer.Option("--record", help="Put the results of one class into the evidence; a sweep always does.")
    ] = False,
    evidence: Annotated[Path, typer.Option(help="Where results are kept; the manifest cites them.")] = EVIDENCE,
) -> None:
    """Run ports on the real engine beside Diffusers and compare numbers."""
    from porter.commands import Verification
    from porter.commands import verify as run

    what = Again.unknown if changed else again
    options = Verification(
        rungs, checkpoint, json_file, out, device, threads, record, evidence, everything, what, limit
    )
    raise typer.Exit(run(classes or [], options))


@app.command()
def explain(
    subject: Annotated[str | None, typer.Argument(metavar="CODE|RULE|FILE:LINE")] = None,
    rules: Rules = None,
) -> None:
    """Explain a diagnostic, a rule, or a line of a generated file. Without a subject: the list of codes."""
    from porter.explain import explain as run

    print(run(subject, rules))


@app.command()
def status(
    out: Out = Path("generated"),
    ports: Annotated[bool, typer.Option("--ports", help="Every port with its features instead.")] = False,
    fmt: FormatOption = Format.rich,
    corpus: Annotated[Path, typer.Option(help="Folder with the catalogue and the evidence.")] = CORPUS,
) -> None:
    """How many live pipelines of Diffusers are ported and proven, by tier and family, and what blocks the others."""
    from porter.commands import status as run

    raise typer.Exit(run(out, fmt.value, ports, corpus))


@app.command()
def coverage(
    classes: Annotated[list[str] | None, typer.Argument(metavar="[CLASS...]", help="Try these instead.")] = None,
    out: Out = Path("generated"),
    corpus: Annotated[Path, typer.Option(help="Folder with the configurations of denoisers.")] = CORPUS,
    source: Source = None,
) -> None:
    """Every class and what is proven about it, as CSV; tests/corpus/coverage.csv is a copy of this. With classes, what
    their conversion gives, of another version of Diffusers, say; nothing is written."""
    from porter.commands import coverage as run

    raise typer.Exit(run(classes or [], out, corpus, source))


@app.command()
def benchmark(
    classes: Annotated[list[str] | None, typer.Argument(metavar="CLASS...", help="Pipelines or denoisers.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every class that Diffusers has, as one conversion.")
    ] = False,
    together: Annotated[bool, typer.Option("--together", help="The classes as one conversion.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Figures are medians of so many runs.")] = 5,
    verification: Annotated[bool, typer.Option("--verify", help="Time `porter verify` of each class, too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    out: Out = Path("generated"),
    source: Source = None,
) -> None:
    """Time conversions against LibCST's own parsing and printing of the same files."""
    from porter.benchmark import run

    raise typer.Exit(run(classes or [], everything, together, repeats, verification, json_file, out, source))


@app.command()
def bench(
    classes: Annotated[list[str], typer.Argument(metavar="CLASS...", help="Pipelines or denoisers with a port.")],
    out: Out = Path("generated"),
    json_file: Annotated[Path, typer.Option("--json", help="The record, kept up to date.")] = Path("bench.json"),
    whole: Annotated[bool, typer.Option("--whole", help="Whole requests: encode, denoise, decode.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    cards: Annotated[int, typer.Option(min=1, max=2, help="2: tensor, sequence and guidance parallel.")] = 1,
    modes: Annotated[str, typer.Option(help="Of two cards, comma-separated.")] = "tp,ulysses,cfg",
    sides: Annotated[str | None, typer.Option(help="Comma-separated (default: all).")] = None,
    cases: Annotated[str, typer.Option(help="Comma-separated names of a workload's cases.")] = "",
    most_cases: Annotated[int | None, typer.Option(min=1, help="The first cases of each workload.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers in all (default: the real number).")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The corpus' tiny cases: a dry run.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Hold one side at a time in memory.")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Interleaved rounds of timing; 0: errors alone.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Length of the walk that shows how errors grow.")] = 6,
    budget: Annotated[float, typer.Option(help="Seconds in all.")] = 3600.0,
    step_seconds: Annotated[float, typer.Option(help="Most seconds of one step of one side.")] = 180.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
) -> None:
    """Time ports beside Diffusers and the engine's hand ports at real layer sizes; 5 if a side fails or disagrees."""
    from porter.bench.drive import Options
    from porter.bench.run import names, run
    from porter.bench.sides import SIDES

    options = Options(
        device, out, json_file, names(sides) or tuple(SIDES), names(cases), most_cases, depth, tiny, alone, rounds, steps,
        budget, step_seconds, threads,
    )  # fmt: skip
    raise typer.Exit(run(classes, options, cards=cards, modes=names(modes), whole=whole))


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Records of porter bench.")],
    html: Annotated[Path | None, typer.Option(help="Write one page that needs no network.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write it for a pull request.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records joined into one.")] = None,
    kept: Annotated[
        Path | None,
        typer.Option("--keep", help="Write one record without folders and most pictures, for a repository."),
    ] = None,
    out: Out = Path("generated"),
) -> None:
    """Pages from records of porter bench. Without an option: the README's performance table, to stdout."""
    from porter.bench.report import keep, write

    if kept is not None:
        if len(files) != 1 or html or markdown or json_file:
            raise typer.BadParameter("takes one FILE and no other option", param_hint="--keep")
        raise typer.Exit(keep(files[0], kept))

    raise typer.Exit(write(files, html, markdown, json_file, out))


@rules_app.command("list")
def rules_list(rules: Rules = None, fmt: FormatOption = Format.rich) -> None:
    """All rules in the order in which they run."""
    from porter.engine.authoring import listing

    print(listing(rules, fmt.value), end="")


@rules_app.command("show")
def rules_show(rule: Annotated[str, typer.Argument(metavar="RULE")], rules: Rules = None) -> None:
    """One rule: what it does, its first example as a patch, its file."""
    from porter.engine.authoring import show

    print(show(rule, rules), end="")


@rules_app.command("test")
def rules_test(
    names: Annotated[list[str] | None, typer.Argument(metavar="RULE...")] = None,
    rules: Rules = None,
) -> None:
    """Check rule files and run their examples; 4 if one fails."""
    from porter.engine.authoring import test

    raise typer.Exit(OK if test(tuple(names or ()), rules) else EXAMPLES)


@rules_app.command("new")
def rules_new(
    name: Annotated[str, typer.Argument(metavar="RULE")],
    folder: Annotated[str, typer.Option("--in", help="Folder below rules/.")] = "transformer",
    rules: Rules = None,
) -> None:
    """Start a rule file that passes its own examples."""
    from porter.engine.authoring import new

    print(new(name, folder, rules))


@rules_app.command("stats")
def rules_stats(rules: Rules = None, out: Out = Path("generated")) -> None:
    """How many rules, cases, ops, examples and hints there are, and how many sites of the ports ops handled."""
    from porter.engine.authoring import stats

    print(stats(rules, out), end="")


@rules_app.command("schema")
def rules_schema(
    write: Annotated[bool, typer.Option("--write", help="Put it into rules/rule.schema.json.")] = False,
    rules: Rules = None,
) -> None:
    """The JSON Schema of rule files, for editors."""
    from porter.engine.authoring import schema

    print(schema(write, rules), end="")


@rules_app.command("docs")
def rules_docs(
    folder: Annotated[Path, typer.Argument(help="Where the pages go.")] = Path("docs/diagnostics"),
) -> None:
    """Write the pages of docs/diagnostics from the catalogue."""
    from porter.diagnostics.pages import pages
    from porter.emit.write import write_atomically

    for name in write_atomically(pages(), folder):
        print(folder / name)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; every failure becomes one clear message on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    from porter.model import PorterError

    usage_error: Any = typer.BadParameter.__mro__[1]  # typer exports no name for it
    try:
        result = _command(given).main(args=given, prog_name="porter", standalone_mode=False)
        if result == INTERRUPTED:  # that is all that typer makes of an interrupt
            return interrupted()
        return result if isinstance(result, int) else OK
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except usage_error as error:
        error.show()
        return USAGE
    except PorterError as error:
        from porter.diagnostics.render import lines_of, render

        print(render(error.diagnostics, "rich", lines_of(Path.cwd())), file=sys.stderr, end="")
        return USAGE
    except BrokenPipeError:
        sys.stderr.close()
        return OK
    except Exception as error:  # noqa: BLE001 - the last resort: one line instead of a page
        if "--debug" in given:
            import traceback

            traceback.print_exc()
        hint = "" if "--debug" in given else "; run again as `porter --debug ...` for a traceback"
        print(f"porter: internal error (PORT015): {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return INTERNAL


def _command(given: list[str]) -> Any:  # noqa: ANN401 - typer exports no name for it
    """The program; of a command that is named first, only this one is built."""
    named = [c for c in app.registered_commands if given and c.callback and c.callback.__name__ == given[0]]
    chosen = copy(app) if named else app
    if named:
        chosen.registered_commands, chosen.registered_groups = named, []
    return typer.main.get_command(chosen)
