"""The story from a name to files: the same bytes each time, everything on record, nothing left of the source's marks."""

from __future__ import annotations

import ast
import json
from itertools import pairwise

import pytest

from porter.convert import convert, rules_digest
from porter.emit.linemap import LineMap
from porter.evidence import code_digest
from porter.manifest import with_ports
from porter.model import Diagnostic, PorterError
from porter.source.library import open_library

DENOISER = "CogView4Transformer2DModel"
FOLDER = "cog_view4"
MODULE = f"{FOLDER}/cog_view4_transformer.py"
FIELDS = ["source", "arch", "folder", "module", "class", "pre_process", "post_process", "denoisers", "features"]


@pytest.fixture(scope="module")
def done():
    return convert([f"diffusers.{DENOISER}"])


@pytest.fixture(scope="module")
def record(done):
    return json.loads(done.files[f"{FOLDER}/port.json"])


def entries(conversion):
    return json.loads(conversion.files["manifest.json"])["ports"]


@pytest.fixture(scope="module")
def again():
    """A second run, which names the denoiser in two ways."""
    return convert([DENOISER, f"diffusers.{DENOISER}"])


def test_converting_twice_gives_the_same_bytes(done, again):
    assert again.files == done.files


def test_naming_a_denoiser_twice_does_not_convert_it_twice(done, again):
    assert again.edits_planned == done.edits_planned


def test_a_denoiser_is_one_file_in_a_folder_of_its_stem(done):
    assert {f for f in done.files if f.startswith(FOLDER + "/")} == {
        MODULE,
        f"{FOLDER}/__init__.py",
        f"{FOLDER}/port.json",
    }


def test_every_python_file_parses_and_carries_neither_marks_nor_absolute_names(done):
    for name, text in done.files.items():
        if name.endswith(".py"):
            ast.parse(text)
            assert "§" not in text and "·" not in text, name


def test_imports_inside_a_folder_are_relative(done):
    for node in ast.walk(ast.parse(done.files[f"{FOLDER}/__init__.py"])):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1


def test_the_denoiser_takes_the_engines_configuration_and_every_parameter_of_its_own(done):
    root = next(n for n in ast.parse(done.files[MODULE]).body if isinstance(n, ast.ClassDef) and n.name == DENOISER)
    methods = {n.name: n for n in root.body if isinstance(n, ast.FunctionDef)}
    arguments = methods["__init__"].args
    assert [a.arg for a in arguments.args] == ["self"]
    names = [a.arg for a in arguments.kwonlyargs]
    assert names[:3] == ["od_config", "quant_config", "prefix"]
    source = open_library().module("diffusers.models.transformers.transformer_cogview4").node(DENOISER)
    theirs = next(n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "__init__").args
    defaults = dict(zip([a.arg for a in theirs.args[1:]], theirs.defaults, strict=True))
    ours = dict(zip(names, arguments.kw_defaults, strict=True))
    assert {n: ast.unparse(ours[n]) for n in defaults} == {n: ast.unparse(d) for n, d in defaults.items()}
    assert "load_weights" in methods


# ---- manifest


def test_the_manifest_has_the_fields_of_the_contract_and_no_others(done):
    manifest = json.loads(done.files["manifest.json"])
    assert list(manifest) == ["schema", "diffusers", "engine", "ports"]
    assert (manifest["schema"], manifest["diffusers"], manifest["engine"]) == (1, "0.40.0", "vllm-omni 0.30.0")
    assert [list(p) for p in manifest["ports"]] == [FIELDS]


def test_a_denoiser_alone_claims_no_pipeline(done):
    (entry,) = entries(done)
    assert [entry[f] for f in ("module", "class", "pre_process", "post_process")] == [None] * 4
    assert (entry["source"], entry["arch"], entry["folder"]) == (f"diffusers.{DENOISER}", DENOISER, FOLDER)
    assert entry["denoisers"] == {
        "transformer": {"source": f"diffusers.{DENOISER}", "module": "cog_view4_transformer", "class": DENOISER}
    }


def test_nothing_is_claimed_without_evidence(done):
    (entry,) = entries(done)
    assert "validated" not in {f["status"] for f in entry["features"].values()}


def with_evidence(path, digest):
    state = {"status": "validated", "evidence": "max error 1e-7"}
    path.write_text(json.dumps({DENOISER: {"digest": digest, "features": {"weights": state}}}))
    (entry,) = entries(convert([DENOISER], evidence=path))
    return entry["features"].get("weights")


def test_evidence_about_this_code_is_claimed(done, tmp_path):
    digest = code_digest(FOLDER, ["cog_view4_transformer"], done.files.__getitem__)
    assert with_evidence(tmp_path / "evidence.json", digest) == {"status": "validated", "evidence": "max error 1e-7"}


def test_evidence_about_other_code_is_not_claimed(tmp_path):
    assert with_evidence(tmp_path / "evidence.json", "0" * 64) is None


# ---- port.json


def test_the_record_has_the_digest_of_the_source(record):
    library = open_library()
    module = library.module("diffusers.models.transformers.transformer_cogview4")
    assert record["digests"][module.file] == module.digest
    assert all(len(d) == 64 for d in record["digests"].values())


def test_the_line_map_covers_each_line_once(done, record):
    rows = record["lines"]["cog_view4_transformer.py"]
    assert rows[0][0] == 1 and rows[-1][1] == len(done.files[MODULE].splitlines())
    assert all(after[0] == before[1] + 1 for before, after in pairwise(rows))


def test_a_line_that_came_from_the_source_names_a_line_that_exists(done, record):
    origins = {o for o in LineMap.from_json(record["lines"]["cog_view4_transformer.py"]).origins if o.file}
    root = open_library().root
    for file in {o.file for o in origins if o.file.startswith("models/")}:
        total = len((root / file).read_text(encoding="utf-8").splitlines())
        assert all(1 <= o.line <= total for o in origins if o.file == file)


def test_the_class_line_comes_from_the_class_line(done, record):
    number = 1 + done.files[MODULE].splitlines().index(f"class {DENOISER}(nn.Module):")
    origin = LineMap.from_json(record["lines"]["cog_view4_transformer.py"]).at(number)
    source = (open_library().root / origin.file).read_text(encoding="utf-8").splitlines()
    assert source[origin.line - 1].startswith(f"class {DENOISER}(")


def test_no_path_of_this_machine_is_on_record(done):
    root = str(open_library().root)
    assert [n for n, text in done.files.items() if root in text] == []


# ---- refusals and digests


def test_a_base_class_that_no_rule_knows_is_reported_and_stays():
    """It may hold behaviour: nothing but the rule on mixins takes bases away."""
    from tests.robustness.trial import Target, converted, installed, overlay

    target = Target(DENOISER, "models/transformers/transformer_cogview4.py")
    text = (installed().root / target.file).read_text(encoding="utf-8")
    changed = text.replace(f"class {DENOISER}(ModelMixin, ", f"import abc\n\nclass {DENOISER}(ModelMixin, abc.ABC, ")
    assert changed != text
    with overlay(target.file, changed) as source:
        done = converted(target, source)
    assert [d.message for d in done.diagnostics if d.code == "PORT121"]
    (header,) = [line for line in done.files[MODULE].splitlines() if line.startswith(f"class {DENOISER}(")]
    assert "ABC" in header


def test_the_rules_digest_changes_with_a_rule_and_not_with_other_files(tmp_path, monkeypatch):
    rules, templates = tmp_path / "rules", tmp_path / "templates"
    rules.mkdir(), templates.mkdir()
    (rules / "a.yaml").write_text("rule: a\n")
    monkeypatch.setattr("porter.resources.RULES", rules)
    monkeypatch.setattr("porter.resources.TEMPLATES", templates)
    before = rules_digest()
    (rules / "notes.txt").write_text("beside")
    assert rules_digest() == before
    (rules / "a.yaml").write_text("rule: b\n")
    assert rules_digest() != before


def test_a_port_made_with_other_rules_does_not_name_the_projects(tmp_path):
    (tmp_path / "a.yaml").write_text("rule: a\n")
    assert rules_digest(tmp_path) != rules_digest()


def test_a_pipeline_whose_loop_calls_a_unet_is_ported_no_further_than_its_transformer(tmp_path):
    done = convert(["StableUnCLIPPipeline"])
    assert "PORT005" in {d.code for d in done.diagnostics}
    assert [(p.source, p.module) for p in done.ports] == [("diffusers.StableUnCLIPPipeline", None)]


def test_a_denoiser_that_cannot_be_ported_does_not_keep_others_from_it(monkeypatch):
    from porter import convert as module

    port = module.port_transformer

    def refusing(library, qualified, rules, policy):
        if qualified.endswith(".FluxTransformer2DModel"):
            raise PorterError(Diagnostic("PORT101", "no"))
        return port(library, qualified, rules, policy)

    monkeypatch.setattr(module, "port_transformer", refusing)
    done = convert(["FluxTransformer2DModel", DENOISER])
    assert [p.source for p in done.ports] == [f"diffusers.{DENOISER}"]
    assert "PORT101" in {d.code for d in done.diagnostics}
    with pytest.raises(PorterError):
        convert(["FluxTransformer2DModel"])


def test_a_manifest_that_is_read_and_written_again_stays_the_same():
    rows = [{"folder": "b", "arch": "B", "reason": "x·y"}, {"folder": "c", "arch": "C"}]
    text = json.dumps({"schema": 1, "ports": rows}, indent=2) + "\n"
    assert with_ports(text, ()) == text
    assert [p["folder"] for p in json.loads(with_ports(text, [{"folder": "a", "arch": "A"}]))["ports"]] == [
        "a",
        "b",
        "c",
    ]
