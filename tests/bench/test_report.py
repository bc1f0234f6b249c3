"""Pages and tables from records."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from porter.bench.places import without_folders
from porter.bench.report import keep, performance, write
from porter.exits import OK, USAGE

ROOT = Path(__file__).resolve().parents[2]


def side(*medians: float, kernel: float | None = None, failures: tuple[str, ...] = ()) -> dict[str, Any]:
    rounds = [{"median": m, "samples": [m] * 10, "peak_gib": 2.5, "kernel_ms": kernel} for m in medians]
    compiled = {"graphs": 2, "breaks": 1, "break_reasons": ["a <print>"], "recompiles": 0, "recompile_reasons": []}
    profile = {"kernels": [["kernel<int>", 3, 50.0]], "total_us": 100.0, "launches": 7, "attention": ["cuDNN"]}
    return {"facts": {"parameters": 1200, "missing": 0, "backend": ["FLASH_ATTN"]}, "failures": list(failures),
            "runs": {"small": {"first_seconds": 1.0}}, "compiled": {"small": compiled},
            "rounds": {"small": rounds} if rounds else {}, "profiles": {"small": profile}}  # fmt: skip


def pixels() -> dict[str, Any]:
    return {"rows": 1, "columns": 2, "rgb": base64.b64encode(bytes([255, 0, 0, 0, 0, 255])).decode()}


def record() -> dict[str, Any]:
    errors = {"diffusers-eager": {"reference": 5e-3}, "diffusers-tuned": {"reference": 4e-3, "diffusers-eager": 3e-3},
              "port-compiled": {"reference": 4.2e-3, "diffusers-tuned": 1e-3}}  # fmt: skip
    two = {"rounds": [], "apart": 2e-3, "ms": 5.0, "speedup": 1.9}
    row = {
        "size": "3 of 9 layers", "full": False, "config": {"layers": 3}, "cases": {"small": {"x": {"randn": [1, 8]}}},
        "counts": {"small": {"tflop": 1.0, "least_gb": 1.0, "operator_gb": 5.0, "tokens": 100}},
        "agreement": {"small": errors}, "parallel": {"port": {"cfg": {"compiled": two, "bound": 1e-2, "sharded": True,
                                                                      "proof": "1 and 1 of 2 calls"}}},
        "sides": {"diffusers-eager": side(12.0, 12.1, kernel=10.0), "diffusers-tuned": side(8.0, 8.1, kernel=7.9),
                  "hand-compiled": side(failures=("out of memory: <cut>",)), "port-compiled": side(7.0, 7.1, kernel=6.9)},
        "growth": {"layers": {"port-eager": [["blocks.0", 1e-3]], "diffusers-eager": [["blocks.0", 2e-3]]},
                   "steps": {"port-eager": [1e-3, 2e-3]}},
        "pictures": {"reference": pixels(), "port-compiled": {"output": pixels(), "difference": pixels(), "scale": 0.1}},
    }  # fmt: skip
    return {
        "schema": 1, "command": "porter bench Model", "versions": {"torch": "2"}, "device": {"name": "Card <1>"},
        "ceilings": {"matmul_tflops": 500.0, "copy_gbs": 1000.0}, "when": "2026-01-01", "denoisers": {"Model": row},
        "problems": [{"where": "Model hand-compiled", "message": "out of memory: <cut>"}],
    }  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record()))
    return path


def test_the_readme_table_is_printed_from_the_record(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write([stored], None, None, None, stored.parent) == OK
    said = capsys.readouterr().out
    (row,) = (line for line in said.splitlines() if "`Model` | small | 3 of 9 | Card" in line)
    cells = [c.strip() for c in row.strip("|").split("|")]
    # 7.05 / 8.05; no hand port was timed; 2 ms is the floor at 500 TFLOP/s, 28 % of 7.05
    assert cells == [
        "`Model`",
        "small",
        "3 of 9",
        "Card <1>",
        "12.05 (10.00)",
        "8.05",
        "",
        "",
        "",
        "7.05",
        "",
        "",
        "0.876 ± 0.014",
        "",
        "28 %",
    ]
    assert "| 2 x Card <1> | cfg | 5.0 | 1.90 |" in said and "1 and 1 of 2 calls" in said
    assert "- Card <1>, 2026-01-01, torch 2, 500 TFLOP/s" in said


def test_the_fastest_sides_are_compared_and_both_kinds_of_compiled_code_are_shown() -> None:
    data = record()
    sides = data["denoisers"]["Model"]["sides"]
    sides |= {"hand-static": side(7.5, 7.5, kernel=7.4), "port-static": side(6.0, 6.0, kernel=5.9),
              "port-graphs": side(5.95, 5.95, kernel=5.9)}  # fmt: skip
    (row,) = (line for line in performance.table(data).splitlines() if "`Model` | small | 3 of 9 | Card" in line)
    cells = [c.strip() for c in row.strip("|").split("|")]
    # hand port, static; generated port, static, graphs; 5.95 / 8.05 and 5.95 / 7.5; 2 ms is 34 % of 5.95
    assert cells[7:] == ["", "7.50", "7.05", "6.00", "5.95", "0.739 ± 0.012", "0.793 ± 0.000", "34 %"]


def test_other_cases_have_a_table_of_the_fastest_sides() -> None:
    data = record()
    row = data["denoisers"]["Model"]
    row["cases"]["large"] = {}
    row["counts"]["large"] = row["counts"]["small"] | {"tflop": 2.0}
    for name in ("diffusers-eager", "diffusers-tuned", "port-compiled"):
        row["sides"][name]["rounds"]["large"] = row["sides"][name]["rounds"]["small"]
    text = performance.table(data)
    (found,) = (line for line in text.splitlines() if "`Model` | large |" in line)
    # 4 ms is the floor at 500 TFLOP/s, 57 % of 7.05
    assert [c.strip() for c in found.strip("|").split("|")][4:] == ["8.05", "7.05", "0.876 ± 0.014", "57 %"]
    assert text.index("`Model` | small") < text.index("`Model` | large")


def test_errors_are_counted_and_those_above_the_bound_are_named() -> None:
    data = record()
    good = data["denoisers"]["Model"]
    data["denoisers"]["Wrong"] = {**good, "agreement": {"small": {
        "diffusers-tuned": {"reference": 2e-3}, "port-compiled": {"reference": 5e-3}}}}  # fmt: skip
    data["denoisers"]["Unknown"] = {**good, "agreement": {}}
    text = performance.errors(data)
    assert "1 of 2 denoisers lose at most 1.1 times" in text and text.rstrip().endswith("Above it: `Wrong` 2.50.")
    data["denoisers"]["Wrong, again"] = {**good, "agreement": {"small": {
        "diffusers-tuned": {"reference": 2e-3}, "diffusers-dynamic": {"reference": 4e-3},
        "port-compiled": {"reference": 5e-3}}}}  # fmt: skip
    assert performance.errors(data).rstrip().endswith("Above it: `Wrong` 1.25."), (
        "judged in the same mode once it is known"
    )
    other = {"diffusers-tuned": {"reference": 2e-3}, "port-compiled": {"reference": 7e-3}}
    data["denoisers"]["Wrong, again"]["agreement"]["large"] = other
    assert performance.errors(data).rstrip().endswith("Above it: `Wrong` 3.50."), "another case is judged by itself"
    assert performance.errors({**data, "denoisers": {}}) == ""


def test_the_readme_holds_the_table_of_the_kept_records(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert write(files, None, None, None, ROOT / "generated") == OK
    printed = capsys.readouterr().out.strip()
    readme = (ROOT / "README.md").read_text()
    _, _, rest = readme.partition("<!-- porter report benchmarks/results/*.json -->")
    block, end, _ = rest.partition("<!-- end -->")
    assert end and block.strip() == printed
    assert printed.count("| H200 |") > 10, "the records hold figures"


def test_a_kept_record_has_the_same_figures_and_nothing_of_the_machine(stored: Path, tmp_path: Path) -> None:
    data = record()
    sides = data["denoisers"]["Model"]["sides"]
    sides["port-compiled"]["compiled"]["small"]["recompile_reasons"] = ["x  # srv/site/torch/nn/a.py:3 in f"]
    data["denoisers"]["Other"] = record()["denoisers"]["Model"]
    data["problems"] = [{"where": "Model", "message": "raised in /srv/x/vllm_omni/b.py: no heads"}]
    stored.write_text(json.dumps(data))
    out = tmp_path / "kept" / "record.json"
    assert keep(stored, out) == OK
    kept = json.loads(out.read_text())
    assert [name for name, row in kept["denoisers"].items() if "pictures" in row] == ["Model"]
    assert "srv" not in out.read_text() and "/x/" not in out.read_text()
    assert kept["problems"][0]["message"] == "raised in vllm_omni/b.py: no heads"
    assert performance.table(kept) == performance.table(data)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("x is None  # srv/a/generated/sd3/sd3_transformer.py:328 in forward\nUser stack trace:\n  File \"/srv/a/.",
         "x is None  # sd3/sd3_transformer.py:328 in forward"),
        ("x is None  # if x:  # rv/a/generated/ltx_vid", "x is None  # if x:  # ltx_vid"),
        ("/srv/a/site/torch/nn/a.py and /srv/b/c.py", "torch/nn/a.py and b/c.py"),
    ],
)  # fmt: skip
def test_of_a_path_its_end_is_left(text: str, left: str) -> None:
    assert without_folders(text) == left


@pytest.mark.parametrize(
    "text", ["https://example.org/torch/docs", "torch/nn/a.py", "q/k of vllm", "a ratio of torch / diffusers"]
)
def test_what_is_no_folder_stays(text: str) -> None:
    assert without_folders(text) == text


class Outside(HTMLParser):
    """Collects what a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and not str(value).startswith(("data:", "#")):
                self.fetched.append(f"{tag} {value}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_network_and_holds_everything(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    assert write([stored], page, None, None, tmp_path) == OK
    parser = Outside()
    text = page.read_text()
    parser.feed(text)
    assert parser.fetched == []
    assert "url(http" not in text and "@import" not in text
    said = " ".join(parser.text)
    assert "Card <1>" in said, "escaped, so that it is text"
    for part in ("Two cards", "Agreement", "Roofline", "Outputs side by side", "kernel<int>", "a <print>", "floor"):
        assert part in said
    assert text.count("<svg") == 5, "errors by block and step, latency, memory, roofline"


def test_the_same_record_gives_the_same_page(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.html", "b.html"):
        write([stored], tmp_path / name, None, None, tmp_path)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_markdown_has_whole_tables(stored: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert write([stored], None, page, None, tmp_path) == OK
    blocks: list[list[str]] = [[]]
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    tables = [b for b in blocks if b]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "holds" in page.read_text()


def test_charts_without_matplotlib_are_refused_with_the_package(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write([stored], tmp_path / "page.html", None, None, tmp_path) == USAGE
    assert "porter[report]" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 1}', '{"schema": 2, "denoisers": {}}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert write([path], None, None, None, tmp_path) == USAGE
    assert "other.json" in capsys.readouterr().err


def test_a_record_without_figures_prints_where_it_was_made_only() -> None:
    data = record()
    data["denoisers"] = {}
    assert performance.table(data).count("|") == 0
