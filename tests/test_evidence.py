"""A claim does not outlive the code it was made about."""

import json

import pytest

from porter.evidence import Finding, cited, code_digest, features_of, reader, remember

CODE = "# Ported by porter from diffusers.Foo, rule set abc.\n# Generated.\nx = 1\n"
PORT = {
    "source": "diffusers.Foo",
    "folder": "foo",
    "module": "pipeline_foo",
    "denoisers": {"transformer": {"source": "diffusers.Net", "module": "foo_transformer"}},
}
SIBLING = {**PORT, "source": "diffusers.Bar", "module": "pipeline_bar"}
STATE = {"status": "validated", "evidence": "max error 1e-7"}


def digest(files, modules=("a",)):
    return code_digest("foo", modules, files.__getitem__)


def test_evidence_lapses_when_the_code_changes():
    record = {"digest": digest({"foo/a.py": CODE}), "features": {"tp": STATE}}
    assert features_of(record, digest({"foo/a.py": CODE})) == {"tp": STATE}
    assert features_of(record, digest({"foo/a.py": CODE.replace("x = 1", "x = 2")})) == {}


def test_a_new_rule_set_that_changes_no_code_does_not_lapse_it():
    assert digest({"foo/a.py": CODE}) == digest({"foo/a.py": CODE.replace("rule set abc", "rule set def")})


def test_an_ordinary_comment_is_code_and_lapses_it():
    assert digest({"foo/a.py": CODE}) != digest({"foo/a.py": CODE.replace("# Generated.", "# Other.")})


def test_any_file_of_the_port_lapses_it():
    files = {"foo/a.py": CODE, "foo/b.py": CODE}
    assert digest(files, ["a", "b"]) != digest({**files, "foo/b.py": CODE + "y = 1\n"}, ["a", "b"])


def test_the_order_in_which_files_are_named_makes_no_difference():
    files = {"foo/a.py": "x = 1\n", "foo/b.py": "y = 1\n"}
    assert digest(files, ["b", "a", "a"]) == digest(files, ["a", "b"])


def test_no_record_proves_nothing():
    assert features_of(None, "abc") == {}
    assert features_of({"features": {"tp": STATE}}, "abc") == {}


def test_a_module_that_it_imports_from_its_folder_is_part_of_the_code():
    files = {"foo/a.py": "from .b import f\n", "foo/b.py": "def f(): ...\n", "foo/c.py": "x = 1\n"}
    assert digest(files) != digest({**files, "foo/b.py": "def f(): return 1\n"})
    assert digest(files) == digest({**files, "foo/c.py": "x = 2\n"})


@pytest.fixture
def generated(tmp_path):
    folder = tmp_path / "generated"
    (folder / "foo").mkdir(parents=True)
    for name in ("pipeline_foo", "pipeline_bar", "foo_transformer"):
        (folder / f"foo/{name}.py").write_text(f"{CODE}{name} = 1\n")
    (folder / "manifest.json").write_text(json.dumps({"ports": [PORT, SIBLING]}))
    return folder


@pytest.fixture
def record(tmp_path):
    return tmp_path / "evidence.json"


def add(record, generated, name, **features):
    remember(record, generated, {name: Finding(features, dict.fromkeys(features, 1.25), "abc")})


def features(record, name="Foo"):
    return json.loads(record.read_text())[name]["features"]


def shown(record, generated, port=PORT):
    return cited(port, json.loads(record.read_text()), reader(generated))


def test_what_was_found_about_the_same_code_is_added_to(generated, record):
    add(record, generated, "Foo", step=STATE)
    add(record, generated, "Foo", cfg=STATE)
    assert features(record) == {"cfg": STATE, "step": STATE}
    assert json.loads(record.read_text())["Foo"]["cases"] == {"cfg": "abc", "step": "abc"}


def test_what_was_found_about_other_code_goes(generated, record):
    add(record, generated, "Foo", step=STATE)
    (generated / "foo/pipeline_foo.py").write_text(CODE + "y = 2\n")
    add(record, generated, "Foo", cfg=STATE)
    assert features(record) == {"cfg": STATE}


def test_what_is_found_about_a_denoiser_shows_in_every_port_that_uses_it(generated, record):
    add(record, generated, "Net", tp=STATE)
    assert shown(record, generated) == shown(record, generated, SIBLING) == {"tp": STATE}


def test_what_is_found_about_a_pipeline_shows_in_no_other(generated, record):
    add(record, generated, "Foo", cfg=STATE)
    assert shown(record, generated) == {"cfg": STATE}
    assert shown(record, generated, SIBLING) == {}


def test_a_change_in_one_pipeline_leaves_the_proof_of_the_denoiser_and_of_the_others(generated, record):
    for name in ("Net", "Foo", "Bar"):
        add(record, generated, name, **{name: STATE})
    (generated / "foo/pipeline_foo.py").write_text(CODE)
    assert shown(record, generated) == {"Net": STATE}
    assert shown(record, generated, SIBLING) == {"Bar": STATE, "Net": STATE}


def test_a_change_in_a_denoiser_lapses_the_proof_of_its_pipelines(generated, record):
    add(record, generated, "Foo", cfg=STATE)
    (generated / "foo/foo_transformer.py").write_text(CODE)
    assert shown(record, generated) == {}


def test_a_port_with_two_denoisers_is_as_good_as_the_worse_one(generated, record):
    (generated / "foo/other.py").write_text("x = 1\n")
    two = {**PORT, "denoisers": {**PORT["denoisers"], "other": {"source": "diffusers.Other", "module": "other"}}}
    (generated / "manifest.json").write_text(json.dumps({"ports": [two]}))
    add(record, generated, "Net", tp=STATE)
    assert shown(record, generated, two)["tp"] == {"status": "not tested", "reason": "Other was not run"}
    add(record, generated, "Other", tp={"status": "limited", "reason": "fails: odd"})
    assert shown(record, generated, two)["tp"]["status"] == "limited"
    add(record, generated, "Other", tp=STATE)
    assert shown(record, generated, two)["tp"] == STATE


def test_a_class_that_was_not_run_gets_no_record(generated, record):
    add(record, generated, "Foo", tp=STATE)
    assert set(json.loads(record.read_text())) == {"Foo"}


def test_remembering_one_class_does_not_forget_another(generated, record):
    add(record, generated, "Foo", tp=STATE)
    add(record, generated, "Bar", tp=STATE)
    assert features(record, "Foo") == features(record, "Bar") == {"tp": STATE}


def test_a_state_of_a_class_that_does_not_exist_is_not_recorded(generated, record):
    add(record, generated, "Nobody", tp=STATE)
    assert json.loads(record.read_text()) == {}
