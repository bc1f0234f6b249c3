"""Formatting loses no line's origin."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.emit.linemap import LineMap, Origin, finish
from porter.emit.write import write_atomically
from porter.model import PorterError

SAMPLE = '''import torch

class A(
    B,
):  #§src.py:10;strip§
    """Doc
    string."""  #§src.py:11;§

    # about f
    @deco
    def f(self, x,
          y):  #§src.py:20;§
        if x:  #§src.py:21;§
            return g(aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, 'bbbbbbbbbbbbbbbbbbbbbbbbb', cc=d)  #§src.py:22;one,two§
        else:
            z = 1; y = 2  # mine  #§src.py:24;§
        try:  #§src.py:25;§
            pass  #§src.py:26;§
        except E:
            raise  #§src.py:28;§
        return x  #§src.py:29;§
'''


@pytest.fixture(scope="module")
def finished():
    return finish({"a.py": SAMPLE}, {"a.py": "transformer/module.jinja"})["a.py"]


def line_of(finished, text):
    rows = finished.text.splitlines()
    return finished.lines.at(1 + next(i for i, row in enumerate(rows) if text in row))


def test_no_mark_reaches_the_file_and_own_comments_stay(finished):
    assert "§" not in finished.text and "# mine" in finished.text and "# about f" in finished.text


def test_every_line_has_an_origin(finished):
    assert len(finished.lines.origins) == len(finished.text.splitlines())


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("class A(", Origin("src.py", 10, ("strip",))),
        ("string.", Origin("src.py", 11)),
        ("# about f", Origin("src.py", 20)),
        ("@deco", Origin("src.py", 20)),
        ("def f(", Origin("src.py", 20)),
        ("bbbb", Origin("src.py", 22, ("one", "two"))),
        ("z = 1", Origin("src.py", 24)),
        ("y = 2", Origin("src.py", 24)),
        ("raise", Origin("src.py", 28)),
        ("import torch", Origin(None, 0, ("template:transformer/module.jinja",))),
    ],
)
def test_a_line_keeps_its_origin_through_formatting(finished, text, origin):
    assert line_of(finished, text) == origin


def test_the_map_survives_json(finished):
    assert LineMap.from_json(finished.lines.to_json()) == finished.lines
    assert finished.lines.at(0) is None and finished.lines.at(10_000) is None


def test_text_that_does_not_parse_names_the_rule_that_wrote_it():
    with pytest.raises(PorterError) as error:
        finish({"a.py": "x = (1  #§src.py:3;bad-rule§\ny = 2\n"})
    (found,) = error.value.diagnostics
    assert found.code == "PORT601"


def test_many_files_are_formatted_in_one_run():
    done = finish({f"{n}.py": f"x  =  {n}  #§s.py:{n};§\n" for n in range(1, 5)})
    assert [done[f"{n}.py"].text for n in range(1, 5)] == [f"x = {n}\n" for n in range(1, 5)]
    assert done["3.py"].lines.at(1) == Origin("s.py", 3)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x=1", "f( a,b )", "y = [1,\n 2]", "if x:\n    z=1  #§s.py:900;§"]), st.booleans()),
        min_size=1,
    )
)
def test_statements_are_mapped_in_order(parts):
    text = ""
    for number, (code, blank) in enumerate(parts, 1):
        first, _, rest = code.partition("\n")
        mark = f"  #§s.py:{number};§"
        text += f"{first}{mark}\n{rest}\n" if first.endswith(":") else f"{code}{mark}\n"
        text += "\n" if blank else ""
    finished = finish({"a.py": text})["a.py"]
    lines = [o.line for o in finished.lines.origins if o.line != 900]
    assert lines == sorted(lines) and set(lines) == set(range(1, len(parts) + 1))


# ---- writing


def test_files_are_written_with_their_folders_and_only_what_changed(tmp_path):
    files = {"a/b.py": "1\n", "c.json": "2\n"}
    assert write_atomically(files, tmp_path) == ["a/b.py", "c.json"]
    assert write_atomically({**files, "c.json": "3\n"}, tmp_path) == ["c.json"]
    assert (tmp_path / "a/b.py").read_text() == "1\n" and (tmp_path / "c.json").read_text() == "3\n"


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_folder_that_cannot_be_made_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "z").write_text("a file where a folder is wanted")
    (tmp_path / "a.py").write_text("old\n")
    before = snapshot(tmp_path)
    with pytest.raises(PorterError) as error:
        write_atomically({"a.py": "new\n", "m/n.py": "1\n", "z/y.py": "2\n"}, tmp_path)
    assert error.value.diagnostics[0].code == "PORT009"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_between_renames_puts_everything_back(tmp_path, monkeypatch, failure):
    (tmp_path / "a.py").write_text("old\n")
    before = snapshot(tmp_path)
    real, count = __import__("os").replace, []

    def replace(old, new):
        count.append(new)
        if len(count) == 3:
            raise failure
        real(old, new)

    monkeypatch.setattr("porter.emit.write.os.replace", replace)
    with pytest.raises((PorterError, KeyboardInterrupt)):
        write_atomically({"a.py": "new\n", "b/c.py": "1\n", "d.py": "2\n"}, tmp_path)
    assert len(count) == 3 and snapshot(tmp_path) == before


def test_written_files_can_be_read_by_others(tmp_path):
    write_atomically({"a.py": "1\n"}, tmp_path)
    assert Path(tmp_path / "a.py").stat().st_mode & 0o444 == 0o444
