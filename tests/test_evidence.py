"""A claim does not outlive the code it was made about."""

import json

import pytest

from porter.evidence import code_digest, features_of, remember

CODE = "# Ported by porter from diffusers.Foo, rule set abc.\n# Generated.\nx = 1\n"
PORT = {
    "arch": "Foo",
    "folder": "foo",
    "module": "pipeline_foo",
    "denoisers": {"transformer": {"module": "foo_transformer"}},
}
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


@pytest.fixture
def generated(tmp_path):
    folder = tmp_path / "generated"
    (folder / "foo").mkdir(parents=True)
    (folder / "foo/pipeline_foo.py").write_text(CODE)
    (folder / "foo/foo_transformer.py").write_text(CODE)
    (folder / "manifest.json").write_text(json.dumps({"ports": [PORT, {**PORT, "arch": "Bar"}]}))
    return folder


@pytest.fixture
def record(tmp_path):
    return tmp_path / "evidence.json"


def features(record, arch="Foo"):
    return json.loads(record.read_text())[arch]["features"]


def test_what_was_found_about_the_same_code_is_added_to(generated, record):
    remember(record, generated, {"Foo": {"tp": STATE}})
    remember(record, generated, {"Foo": {"cfg": STATE}})
    assert features(record) == {"cfg": STATE, "tp": STATE}


def test_what_was_found_about_other_code_goes(generated, record):
    remember(record, generated, {"Foo": {"tp": STATE}})
    (generated / "foo/pipeline_foo.py").write_text(CODE + "y = 2\n")
    remember(record, generated, {"Foo": {"cfg": STATE}})
    assert features(record) == {"cfg": STATE}


def test_a_port_that_was_not_run_gets_no_record(generated, record):
    remember(record, generated, {"Foo": {"tp": STATE}})
    assert set(json.loads(record.read_text())) == {"Foo"}


def test_remembering_one_port_does_not_forget_another(generated, record):
    remember(record, generated, {"Foo": {"tp": STATE}})
    remember(record, generated, {"Bar": {"tp": STATE}})
    assert features(record, "Foo") == features(record, "Bar") == {"tp": STATE}


def test_a_state_of_a_port_that_does_not_exist_is_not_recorded(generated, record):
    remember(record, generated, {"Nobody": {"tp": STATE}})
    assert json.loads(record.read_text()) == {}
