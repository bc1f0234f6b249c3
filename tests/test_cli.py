"""The command line: what goes where, and the exit code of every way to end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from porter import exits
from porter.cli import main
from porter.model import Diagnostic, PorterError, Span

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch):
    """A conversion without a compiler: what `porter.convert.convert` returns is in `fake.files` and `fake.found`."""
    state = SimpleNamespace(
        files={"net/net_transformer.py": "x = 1\n", "manifest.json": manifest("Net")}, found=(), names=[]
    )

    def convert(names, source=None, rules_dir=None, evidence=None, processes=1):
        state.names.append(list(names))
        return SimpleNamespace(
            files=state.files,
            diagnostics=tuple(state.found),
            ports=tuple(SimpleNamespace(folder="net", source=f"diffusers.{n}") for n in names),
            edits_planned=1,
            summary=(("diffusers.Net", "net/"),),
        )

    module = SimpleNamespace(convert=convert, all_names=lambda source: ["diffusers.Net", "diffusers.Other"])
    monkeypatch.setitem(sys.modules, "porter.convert", module)
    monkeypatch.setattr("porter.convert", module, raising=False)
    return state


def manifest(*names, folder="net"):
    ports = [
        {"source": f"diffusers.{n}", "arch": n, "folder": folder, "class": None, "denoisers": {}, "features": {}}
        for n in names
    ]
    return json.dumps({"schema": 1, "diffusers": "0.40.0", "engine": "e", "ports": ports}, indent=2) + "\n"


def test_converting_writes_the_files_and_says_so_on_stderr(fake, tmp_path, capsys):
    assert main(["convert", "Net", "--out", str(tmp_path)]) == exits.OK
    assert (tmp_path / "net/net_transformer.py").read_text() == "x = 1\n"
    out, err = capsys.readouterr()
    assert out == "" and "2 files" in err


def test_names_are_sorted_and_given_once(fake, tmp_path):
    main(["convert", "Zed", "diffusers.Abc", "Zed", "--out", str(tmp_path)])
    assert fake.names == [["Abc", "Zed"]]


def test_a_difference_is_shown_and_not_written(fake, tmp_path, capsys):
    (tmp_path / "net").mkdir()
    (tmp_path / "net/net_transformer.py").write_text("x = 2\n")
    assert main(["convert", "Net", "--diff", "--out", str(tmp_path)]) == exits.OK
    out = capsys.readouterr().out
    assert "-x = 2\n+x = 1\n" in out and (tmp_path / "net/net_transformer.py").read_text() == "x = 2\n"


def test_ports_of_other_folders_stay_in_the_manifest(fake, tmp_path):
    (tmp_path / "manifest.json").write_text(manifest("Other", folder="other"))
    assert main(["convert", "Net", "--out", str(tmp_path)]) == exits.OK
    ports = json.loads((tmp_path / "manifest.json").read_text())["ports"]
    assert [p["source"] for p in ports] == ["diffusers.Net", "diffusers.Other"]
    assert "porter_ports.other" in (tmp_path / "pyproject.toml").read_text()


def test_ports_that_share_a_folder_are_printed_together(fake, tmp_path):
    (tmp_path / "manifest.json").write_text(manifest("NetEdit"))
    main(["convert", "Net", "--out", str(tmp_path)])
    assert fake.names[-1] == ["Net", "NetEdit"]


@pytest.mark.parametrize(("threshold", "expected"), [("high", exits.OK), ("low", exits.FINDINGS), ("never", exits.OK)])
def test_findings_end_with_3_from_the_threshold_on(fake, tmp_path, threshold, expected):
    fake.found = [Diagnostic("PORT302", "a keyword", Span("net.py", 1))]
    assert main(["convert", "Net", "--out", str(tmp_path), "--threshold", threshold]) == expected


def test_findings_are_printed_in_the_format_asked_for(fake, tmp_path, capsys):
    fake.found = [Diagnostic("PORT302", "a keyword", Span("net.py", 1))]
    main(["convert", "Net", "--out", str(tmp_path), "--format", "json"])
    assert json.loads(capsys.readouterr().out)[0]["code"] == "PORT302"


@pytest.mark.parametrize("arguments", [["convert"], ["convert", "Net", "--all"], ["convert", "Net", "--format", "xml"], ["nonsense"], ["rules", "show"]])  # fmt: skip  # noqa: E501
def test_bad_usage_ends_with_2_and_prints_no_data(fake, arguments, capsys):
    assert main(arguments) == exits.USAGE
    assert capsys.readouterr().out == ""


def test_checking_a_folder_that_is_up_to_date_ends_with_0(fake, tmp_path):
    main(["convert", "Net", "--out", str(tmp_path)])
    fake.files = {name: (tmp_path / name).read_text() for name in fake.files}
    assert main(["check", "--out", str(tmp_path)]) == exits.OK


@pytest.mark.parametrize("fmt", ["rich", "github", "sarif"])
def test_a_hand_edit_a_leftover_and_a_missing_file_are_drift(fake, tmp_path, fmt, capsys):
    main(["convert", "Net", "--out", str(tmp_path)])
    fake.files = {**fake.files, "net/__init__.py": "new\n"}
    (tmp_path / "net/net_transformer.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "net/old.py").write_text("")
    before = (tmp_path / "net/net_transformer.py").read_text()
    assert main(["check", "--out", str(tmp_path), "--format", fmt]) == exits.DRIFT
    out = capsys.readouterr().out
    assert all(name in out for name in ("net_transformer.py", "old.py", "__init__.py"))
    assert (tmp_path / "net/net_transformer.py").read_text() == before


def raising(monkeypatch, error):
    def convert(*_args):
        raise error

    module = SimpleNamespace(convert=convert)
    monkeypatch.setitem(sys.modules, "porter.convert", module)
    monkeypatch.setattr("porter.convert", module, raising=False)


def test_a_porter_error_is_printed_with_its_advice(monkeypatch, tmp_path, capsys):
    raising(monkeypatch, PorterError(Diagnostic("PORT003", "no class Nope", advice="did you mean Net?")))
    assert main(["convert", "Nope", "--out", str(tmp_path)]) == exits.USAGE
    err = capsys.readouterr().err
    assert "PORT003" in err and "did you mean Net?" in err


def test_an_internal_error_ends_with_70_in_one_line(monkeypatch, tmp_path, capsys):
    raising(monkeypatch, RuntimeError("boom"))
    assert main(["convert", "Net", "--out", str(tmp_path)]) == exits.INTERNAL
    err = capsys.readouterr().err
    assert "boom" in err and "Traceback" not in err
    assert main(["--debug", "convert", "Net", "--out", str(tmp_path)]) == exits.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_status_lists_ports_and_features(tmp_path, capsys):
    data = json.loads(manifest("Net"))
    data["ports"][0]["features"] = {"tp": {"status": "validated", "evidence": "1e-6"}, "sp": {"status": "not tested"}}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    assert main(["status", "--ports", "--out", str(tmp_path)]) == exits.OK
    out = capsys.readouterr().out
    assert "diffusers.Net" in out and "1 validated" in out and "1 not tested" in out


def test_verifying_needs_names_or_all(capsys):
    for arguments in (["verify"], ["verify", "Net", "--all"], ["verify", "--all", "--checkpoint", "x"]):
        assert main(arguments) == exits.USAGE
        assert "PORT013" in capsys.readouterr().err


# ---- rules


def test_rules_are_listed_in_running_order(capsys):
    assert main(["rules", "list", "--format", "json"]) == exits.OK
    rows = json.loads(capsys.readouterr().out)
    order = ["normalize", "lower", "shard", "optimise", "tidy"]
    assert [r["phase"] for r in rows] == sorted((r["phase"] for r in rows), key=order.index)


def test_a_new_rule_passes_its_own_examples(tmp_path, capsys):
    assert main(["rules", "new", "swap-norm", "--rules", str(tmp_path)]) == exits.OK
    assert (tmp_path / "transformer/swap-norm.yaml").is_file()
    assert main(["rules", "test", "--rules", str(tmp_path)]) == exits.OK


@pytest.mark.parametrize("name", ["Swap_Norm", "../x"])
def test_a_bad_rule_name_is_refused(tmp_path, name):
    assert main(["rules", "new", name, "--rules", str(tmp_path)]) == exits.USAGE
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_exists_is_not_overwritten(tmp_path):
    main(["rules", "new", "swap-norm", "--rules", str(tmp_path)])
    assert main(["rules", "new", "swap-norm", "--rules", str(tmp_path)]) == exits.USAGE


def test_a_failing_example_ends_with_4_and_shows_the_difference(tmp_path, capsys):
    main(["rules", "new", "swap-norm", "--rules", str(tmp_path)])
    path = tmp_path / "transformer/swap-norm.yaml"
    path.write_text(path.read_text().replace("y = new(x)\n  - name", "y = newer(x)\n  - name"))
    assert main(["rules", "test", "swap-norm", "--rules", str(tmp_path)]) == exits.EXAMPLES
    out = capsys.readouterr().out
    assert "wrong: swap-norm: what it does" in out and "-y = newer(x)" in out and "swap-norm.yaml:" in out


def test_showing_a_rule_gives_its_first_example_as_a_patch(capsys):
    assert main(["rules", "show", "replace-logger"]) == exits.OK
    out = capsys.readouterr().out
    assert "  - logger = get_logger(__name__)" in out and "  + logger = init_logger(__name__)" in out


def test_a_misspelt_rule_gets_a_suggestion(capsys):
    assert main(["rules", "show", "replace-loger"]) == exits.USAGE
    assert "replace-logger" in capsys.readouterr().err


def test_stats_count_ops(capsys):
    assert main(["rules", "stats"]) == exits.OK
    assert "cases with an op" in capsys.readouterr().out


# ---- explain


def test_a_code_is_explained_with_the_rules_that_report_it(capsys):
    assert main(["explain", "131"]) == exits.OK
    out = capsys.readouterr().out
    assert "PORT131" in out and "drop-gradient-checkpointing" in out and "What to do" in out


@pytest.mark.parametrize("subject", ["PORT999", "no-such-rule", "nowhere.py:3"])
def test_what_cannot_be_explained_is_said(subject, capsys):
    assert main(["explain", subject]) == exits.USAGE
    assert "PORT012" in capsys.readouterr().err


def test_a_generated_line_is_explained_by_its_source_and_rule(tmp_path, capsys):
    (tmp_path / "net.py").write_text("import torch\nlogger = 1\n")
    lines = {"net.py": [[1, 1, None, ["template:head.jinja"]], [2, 2, "models/unet.py:7", ["replace-logger"]]]}
    (tmp_path / "port.json").write_text(json.dumps({"lines": lines}))
    assert main(["explain", f"{tmp_path}/net.py:2"]) == exits.OK
    out = capsys.readouterr().out
    assert "diffusers/models/unet.py:7" in out and "replace-logger: Diffusers' logger becomes the engine's" in out
    main(["explain", f"{tmp_path}/net.py:1"])
    assert "printed from head.jinja" in capsys.readouterr().out
    assert main(["explain", f"{tmp_path}/net.py:3"]) == exits.USAGE


# ---- the program itself


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def test_help_names_every_exit_code_and_imports_nothing_heavy():
    done = run("-X", "importtime", "-m", "porter", "--help")
    assert done.returncode == 0
    assert all(str(code) in done.stdout for code in (0, 1, 2, 3, 4, 5, 70, 130))
    assert not {"libcst", "torch", "diffusers", "rich", "yaml", "jinja2"} & {
        row.split("|")[-1].strip() for row in done.stderr.splitlines()
    }


def test_the_version_is_printed():
    assert run("-m", "porter", "--version").stdout.startswith("porter ")
