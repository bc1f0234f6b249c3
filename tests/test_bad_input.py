"""Bad input ends with one clear message and one exit code, and files stay as they were. The list, kind by kind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from porter import exits
from porter.cli import main
from porter.emit import write
from porter.pipeline.tables import load_tables
from porter.resources import RULES, TEMPLATES
from porter.verify.environment import check_environment
from tests.circumstances import checkpoint, nobody, stopped
from tests.robustness.trial import overlay

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "generated"
DENOISER, FILE = "CogView4Transformer2DModel", "models/transformers/transformer_cogview4.py"
WITH_LOGGER = "FluxTransformer2DModel"

Refused = Callable[..., str]


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with something of an earlier conversion in it."""
    folder = tmp_path / "out"
    (folder / "cog_view4").mkdir(parents=True)
    (folder / "cog_view4" / "cog_view4_transformer.py").write_text("earlier = 1\n")
    return folder


@pytest.fixture
def refused(out: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused: exit code 2, one message, no data, nothing written. Gives the message."""

    def run(*arguments: object, code: str, status: int = exits.USAGE) -> str:
        before = files_in(out)
        assert main([str(a) for a in arguments]) == status
        printed, said = capsys.readouterr()
        assert re.findall(r"^PORT\d{3}\b|\(PORT\d{3}\)", said, re.MULTILINE) in ([code], [f"({code})"]), said
        assert printed == "" and "Traceback" not in said and "internal error" not in said
        assert files_in(out) == before
        return said

    return run


# ---- names


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("QwenImagePipline", "PORT003", "near it: QwenImagePipeline"),
        ("transformers.BertModel", "PORT003", "transformers.BertModel is no class of diffusers"),
        ("", "PORT003", "(no name)"),
        ("AutoencoderKL", "PORT004", "neither a pipeline nor a transformer"),
        ("diffusers.schedulers.DDIMScheduler", "PORT004", "neither a pipeline nor a transformer"),
        ("StableDiffusionPipeline", "PORT005", "no transformer component"),
    ],
)
def test_a_class_that_cannot_be_ported(refused: Refused, out: Path, name: str, code: str, says: str) -> None:
    assert says in refused("convert", name, "--out", out, code=code)
    assert says in refused("convert", name, DENOISER, "--out", out, code=code)


# ---- the source


@pytest.fixture
def source() -> Iterator[Path]:
    with overlay(FILE, (_installed() / FILE).read_text(encoding="utf-8")) as folder:
        yield folder


def _installed() -> Path:
    from porter.source.library import open_library

    return open_library().root


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda text: text.encode().replace(b"import torch\n", b"import torch  # caf\xe9\n", 1),
            "the source is not UTF-8",
        ),
        (lambda text: text.encode("utf-16"), "the source is not UTF-8"),
        (lambda text: text.replace("hidden_states =", "hidden_states = =").encode(), "does not parse"),
        (lambda text: text.replace(f"class {DENOISER}(", f"class {DENOISER}((").encode(), "does not parse"),
        (lambda text: text.replace("hidden_states", "hidden\0states").encode(), "does not parse"),
    ],
)
def test_a_source_file_that_is_not_python(
    refused: Refused, out: Path, source: Path, change: Callable[[str], bytes], says: str
) -> None:
    text = (source / FILE).read_text(encoding="utf-8")
    (source / FILE).write_bytes(change(text))
    said = refused("convert", DENOISER, "--source", source, "--out", out, code="PORT101")
    assert says in said and re.search(rf"{FILE}:\d+", said)


def test_a_source_that_lacks_a_file(refused: Refused, out: Path, source: Path) -> None:
    (source / FILE).unlink()
    assert "incomplete" in refused("convert", DENOISER, "--source", source, "--out", out, code="PORT003")


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_diffusers(refused: Refused, out: Path, folder: str) -> None:
    refused("convert", DENOISER, "--source", out / folder, "--out", out, code="PORT002")


def test_another_version_of_diffusers_is_refused_unless_it_is_named(
    refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed one is taken for the pinned one; whoever names a source has chosen it, and is told."""
    installed = _installed()
    for module in ("porter.source.library", "porter.convert"):
        monkeypatch.setattr(f"{module}.DIFFUSERS", ("diffusers", "0.39.0"))
    assert "0.39.0" in refused("convert", DENOISER, "--out", out, code="PORT006")
    assert main(["convert", DENOISER, "--source", str(installed), "--out", str(out)]) == exits.OK
    assert "PORT006" in capsys.readouterr().out


# ---- rules and templates

HEAD = "rule: zz-bad\ndoc: x\nphase: normalize\n"
EXAMPLES = """
otherwise: PORT103
examples:
  - name: it does
    before: |
      torch.old(1)
    after: |
      torch.new(1)
  - name: it leaves alone
    unchanged: |
      x = 1
"""


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("rule: zz-bad\ncases: [\n", "PORT210", "zz-bad.yaml:3"),
        ("- a list\n", "PORT212", "zz-bad.yaml:1"),
        (HEAD + "on: {call: torch.old}\ncases:\n  - edit: [{replace: $site, with: print($y)}]" + EXAMPLES, "PORT215", "$y"),
        (HEAD + "on: {fact: no_such_fact}\ncases:\n  - edit: [{remove: $site}]" + EXAMPLES, "PORT217", "no_such_fact"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [("convert", DENOISER), ("check",), ("analyze", DENOISER)])
def test_a_rule_file_with_a_mistake(
    refused: Refused, out: Path, tmp_path: Path, command: tuple[str, ...], text: str, code: str, says: str
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "zz-bad.yaml").write_text(text)
    (out / "manifest.json").write_text(json.dumps({"schema": 1, "ports": [{"source": f"diffusers.{DENOISER}"}]}))
    more = () if command[0] == "analyze" else ("--out", out)
    said = refused(*command, "--rules", rules, *more, code=code)
    assert says in said and "zz-bad.yaml:" in said


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("symbols/diffusers.yaml", "copy: [\n", "PORT210"),
        ("symbols/diffusers.yaml", "copy: []\n", "PORT223"),
        ("symbols/request_parameters.yaml", "", "PORT223"),
        ("symbols/mixins.yaml", "a: [\n", "PORT210"),
        ("models/PixArtTransformer2DModel.yaml", "a: b: c\n", "PORT210"),
    ],
)
def test_a_table_or_a_hint_with_a_mistake(
    refused: Refused, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, code: str
) -> None:
    rules = tmp_path / "rules"
    shutil.copytree(RULES, rules)
    (rules / file).write_text(text)
    for module in ("porter.resources", "porter.engine.load"):
        monkeypatch.setattr(f"{module}.RULES", rules)
    load_tables.cache_clear()
    monkeypatch.setattr("porter.pipeline.tables.load_tables.__wrapped__.__defaults__", (rules / "symbols",))
    try:
        assert file in refused("convert", "PixArtSigmaPipeline", "--out", out, code=code)
    finally:
        load_tables.cache_clear()


def test_two_rules_that_want_the_same_place(refused: Refused, out: Path, tmp_path: Path) -> None:
    """Also among several classes: if nothing is left to write, nothing is written."""
    rules = tmp_path / "rules"
    shutil.copytree(RULES, rules)
    trigger = "symbols: {get_logger: diffusers.utils.logging.get_logger}\non: {call: get_logger}\n"
    text = HEAD + trigger + "cases:\n  - edit: [{replace: $site, with: print(1)}]" + EXAMPLES
    (rules / "zz-bad.yaml").write_text(text)
    said = refused("convert", WITH_LOGGER, "--rules", rules, "--out", out, code="PORT201")
    assert "replace-logger and zz-bad" in said and "after: [replace-logger]" in said
    assert main(["convert", WITH_LOGGER, "QwenImageTransformer2DModel", "--rules", str(rules), "--out", str(out)]) == 2
    assert list(files_in(out)) == ["cog_view4/cog_view4_transformer.py"]


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_rules(refused: Refused, out: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    refused("convert", DENOISER, "--rules", tmp_path / folder, "--out", out, code="PORT211")


@pytest.mark.parametrize(
    ("text", "says"), [("{{ nothing }}\n", "'nothing' is undefined"), ("{% if %}\n", "load_weights.py.jinja:1")]
)
def test_a_template_that_cannot_be_filled(
    refused: Refused, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    (tmp_path / "templates" / "transformer" / "load_weights.py.jinja").write_text(text)
    monkeypatch.setattr("porter.emit.templates.TEMPLATES", tmp_path / "templates")
    assert says in refused("convert", DENOISER, "--out", out, code="PORT602")


# ---- output


def test_an_output_folder_that_is_a_file_or_lies_below_one(refused: Refused, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for there in ("file", "file/below"):
        refused("convert", DENOISER, "--out", tmp_path / there, code="PORT009")
    assert (tmp_path / "file").read_text() == ""


def test_an_output_folder_that_is_read_only(refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = write.write_atomically

    def as_nobody(files: Mapping[str, str], folder: Path) -> list[str]:
        with nobody(folder):
            return real(files, folder)

    monkeypatch.setattr(write, "write_atomically", as_nobody)
    assert "ermission denied" in refused("convert", DENOISER, "--out", out, code="PORT009")


@pytest.mark.parametrize("there", ["out", "file/report.json"])
def test_a_report_that_cannot_be_written_is_known_before_the_work(
    refused: Refused, out: Path, tmp_path: Path, there: str
) -> None:
    (tmp_path / "file").write_text("")
    said = refused("verify", DENOISER, "--out", GENERATED, "--json", tmp_path / there, code="PORT009")
    assert "nothing was run" in said


# ---- the manifest and the evidence


@pytest.mark.parametrize("command", [("status",), ("check",), ("coverage",), ("verify", DENOISER)])
@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_manifest(refused: Refused, out: Path, command: tuple[str, ...], text: str | None) -> None:
    if text is not None:
        (out / "manifest.json").write_text(text)
    assert "manifest.json" in refused(*command, "--out", out, code="PORT013")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_evidence_that_is_none(refused: Refused, out: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "evidence.json").write_text(text)
    assert "is no evidence" in refused(
        "convert", DENOISER, "--out", out, "--evidence", tmp_path / "evidence.json", code="PORT013"
    )


def test_a_corpus_without_a_catalogue(refused: Refused, tmp_path: Path) -> None:
    assert "catalogue.csv" in refused("coverage", "--out", GENERATED, "--corpus", tmp_path, code="PORT013")


# ---- verification


@pytest.mark.parametrize(
    ("found", "code", "says"),
    [
        ({"vllm-omni": None, "diffusers": "0.40.0"}, "PORT007", "the engine is not installed"),
        ({"vllm-omni": "0.29.0", "diffusers": "0.40.0"}, "PORT008", "vllm-omni 0.29.0 is installed, 0.30.0 is needed"),
        ({"vllm-omni": "0.30.0", "diffusers": "0.38.0"}, "PORT006", "diffusers 0.38.0 is installed, 0.40.0 is needed"),
        ({"vllm-omni": "0.30.0", "diffusers": None}, "PORT001", "Diffusers is not installed"),
    ],
)
def test_no_engine_or_another_version(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None], code: str, says: str
) -> None:
    monkeypatch.setattr("porter.verify.environment.version_of", found.get)
    said = refused("verify", DENOISER, "--out", GENERATED, "--rungs", "module", code=code)
    assert says in said and "porter.verify.install" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("QwenImagePipline",), "near it: QwenImagePipeline"),
        (("QwenImagePipeline", "--rungs", "static,nonsense"), "no rung called nonsense"),
        (("QwenImagePipeline", "--device", "tpu"), "tpu is not a device"),
        ((), "name classes, or say --all"),
        (("QwenImagePipeline", "--all"), "name classes, or say --all"),
        (("--all", "--checkpoint", "x"), "a checkpoint belongs to one class"),
    ],
)
def test_options_of_verify_that_mean_nothing(refused: Refused, arguments: tuple[str, ...], says: str) -> None:
    assert says in refused("verify", *arguments, "--out", GENERATED, code="PORT013")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda c: (c / "transformer/model-2.safetensors").unlink(),
            "1 of 2 weight files missing: model-2.safetensors",
        ),
        (lambda c: cut(c / "vae/model.safetensors"), "cut short"),
        (lambda c: (c / "vae/model.safetensors").write_bytes(b"abc"), "cut short"),
        (lambda c: (c / "vae/model.safetensors").unlink(), "no weight file"),
        (lambda c: shutil.rmtree(c / "vae"), "component vae (V) has no folder"),
        (lambda c: (c / "model_index.json").unlink(), "no model_index.json"),
        (lambda c: (c / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda c: (c / "model_index.json").write_text("[]"), "a mapping is expected"),
        (lambda c: (c / "transformer/model.safetensors.index.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    refused: Refused, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    folder = checkpoint(tmp_path / "checkpoint")
    damage(folder)
    said = refused("verify", "QwenImagePipeline", "--out", GENERATED, "--checkpoint", folder, code="PORT011")
    assert says in said


# ---- interrupted halfway


def test_an_interrupt_while_files_are_put_in_place(
    refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = os.replace, []

    def replace(old: str, new: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(new)
        real(old, new)

    monkeypatch.setattr("porter.emit.write.os.replace", replace)
    refused("convert", DENOISER, "--out", out, code="PORT010", status=exits.INTERRUPTED)
    assert len(done) == 2


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
WAYS = [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)]


@needs_proc
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor converts in one process")
@pytest.mark.parametrize(("how", "everyone"), WAYS, ids=["Ctrl-C", "SIGINT", "SIGTERM"])
def test_a_conversion_in_several_processes_that_is_interrupted(tmp_path: Path, how: int, everyone: bool) -> None:
    names = ["CogView4", "CogView3Plus", "Flux", "QwenImage", "SD3", "PixArt", "Lumina2", "AuraFlow", "Sana"]
    arguments = ["convert", *(f"{n}Transformer2DModel" for n in names), "--out", str(tmp_path / "new")]
    stopped(arguments, min(len(os.sched_getaffinity(0)), 8), how, everyone, tmp_path)
    assert not (tmp_path / "new").exists()


@needs_proc
@pytest.mark.skipif(bool(check_environment()), reason="the engine is not there")
@pytest.mark.parametrize(("how", "everyone"), WAYS[:2], ids=["Ctrl-C", "SIGINT"])
def test_a_verification_that_is_interrupted(tmp_path: Path, how: int, everyone: bool) -> None:
    before = (GENERATED / "manifest.json").read_bytes()
    arguments = ["verify", DENOISER, "--rungs", "module", "--out", str(GENERATED), "--json", str(tmp_path / "r.json")]
    stopped(arguments, 2, how, everyone, tmp_path)
    assert not list(tmp_path.glob("porter_verify_*")) and not (tmp_path / "r.json").exists()
    assert (GENERATED / "manifest.json").read_bytes() == before
