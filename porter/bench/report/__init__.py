"""Pages and tables from records of `porter bench`: HTML that needs no network, markdown for a pull request, JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from porter.bench.record import merge, read
from porter.emit.write import write_atomically
from porter.exits import OK, USAGE
from porter.verify.outcome import VerifyError


def keep(record: Path, out: Path) -> int:
    """Write one record without folders and most pictures, as `benchmarks/results` holds it. 2 for a file that is no record."""
    import json

    from porter.bench.places import portable

    try:
        text = json.dumps(portable(read(record)), indent=1) + "\n"
    except VerifyError as error:
        print(f"porter report: {error}", file=sys.stderr)
        return USAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({out.name: text}, out.parent)
    print(out)
    return OK


def write(
    files: Sequence[Path], html: Path | None, markdown: Path | None, json_file: Path | None, generated: Path
) -> int:
    """Write what is asked for; without anything, print the README's table. 2 for a file that is no record."""
    import json

    from porter.bench.report import charts, pages, performance

    try:
        data = merge([read(path) for path in files])
        written = {
            html: lambda: pages.html(data, generated),
            markdown: lambda: pages.markdown(data, generated),
            json_file: lambda: json.dumps(data, indent=1) + "\n",
        }
        for path, text in written.items():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically({path.name: text()}, path.parent)
                print(path)
        if html is None and markdown is None and json_file is None:
            print(performance.table(data), end="")
    except (VerifyError, charts.ChartsMissing) as error:
        print(f"porter report: {error}", file=sys.stderr)
        return USAGE
    return OK
