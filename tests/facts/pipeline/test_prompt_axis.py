"""What each variable of a call holds of the requests that share it."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import Share, prompt_axis


def shares(text: str, inputs: tuple[str, ...] = ("prompt", "generator"), helpers: str = "") -> dict[str, Share]:
    functions = {f.name.value: f for f in cst.parse_module(helpers).body if isinstance(f, cst.FunctionDef)}
    return dict(prompt_axis(list(cst.parse_module(text).body), inputs, functions).shares)


def test_what_a_request_brings_has_rows_wherever_it_goes() -> None:
    found = shares("embeds = self.encode(prompt)\nembeds = embeds.to(device)\nextra = {'generator': generator}\n")
    assert found["embeds"] == Share.ROWS
    assert found["extra"] == Share.ROWS


def test_settings_hold_nothing_of_a_request() -> None:
    found = shares("steps = n or 50\nmu = shift(height // 8)\nzeros = latents.new_zeros(1, 2)\n", ("latents",))
    assert not {"steps", "mu", "zeros"} & found.keys()


def test_type_and_place_of_a_tensor_are_not_its_content() -> None:
    assert "table" not in shares("e = self.encode(prompt)\ntable = torch·zeros(3, dtype=e.dtype, device=e.device)\n")


def test_the_number_of_prompts_is_a_count_and_so_is_its_multiple() -> None:
    found = shares("if isinstance(prompt, str):\n    n = 1\nelse:\n    n = len(prompt)\nm = n * per_prompt\n")
    assert Share.COUNT in found["n"] and Share.ROWS not in found["n"]
    assert Share.COUNT in found["m"]


def test_a_number_made_otherwise_from_a_count_is_unsure() -> None:
    found = shares("n = len(prompt)\nm = n // 2\n")
    assert Share.UNSURE in found["m"] and Share.COUNT not in found["m"]


def test_what_is_made_for_a_count_has_rows() -> None:
    found = shares("n = len(prompt)\nlatents = randn((n, 4, 8))\nshapes = [(1, 2)] * n\n")
    assert Share.ROWS in found["latents"] and Share.ROWS in found["shapes"]


def test_only_the_first_size_of_a_tensor_is_a_count() -> None:
    found = shares("n, length, _ = e.shape\nwidth = e.shape[2]\nm = e.shape[0]\nk = e.size(1)\n", ("e",))
    assert Share.COUNT in found["n"] and Share.COUNT in found["m"]
    assert found["length"] == found["width"] == found["k"] == Share.FACT


def test_a_value_chosen_by_what_a_request_brought_is_a_fact() -> None:
    found = shares("guided = negative is not None\nif guided:\n    scale = 2\nelse:\n    scale = 1\n", ("negative",))
    assert found["guided"] == found["scale"] == Share.FACT


def test_both_branches_one_behind_the_other_are_told_apart_from_a_join_of_features() -> None:
    found = shares("a = torch·cat([n, e], dim=0)\nb = torch·cat([n, e], dim=-1)\nc = torch·cat([e] * 2)\n", ("n", "e"))
    assert Share.BRANCHES in found["a"] and Share.BRANCHES in found["c"]
    assert Share.BRANCHES not in found["b"]


def test_a_method_that_doubles_is_found_through_another_method() -> None:
    helpers = "def outer(self, x):\n    return self.inner(x)\ndef inner(self, x):\n    return torch·cat([x] * 2)\n"
    assert Share.BRANCHES in shares("mask = self.outer(prompt)\nn = self.outer(3)\n", helpers=helpers)["mask"]
    assert "n" not in shares("n = self.outer(3)\n", helpers=helpers)


def test_a_value_carried_round_a_loop_is_followed() -> None:
    assert shares("b = 0\nfor i in range(3):\n    c = b\n    b = self.encode(prompt)\n")["c"] == Share.ROWS


def test_what_is_put_into_a_list_or_an_attribute_counts() -> None:
    found = shares("parts = []\nparts.append(prompt)\nself._prompt = prompt\nd = {}\nd['g'] = generator\n")
    assert found["parts"] == found["self._prompt"] == found["d"] == Share.ROWS


def test_numbers_about_what_a_request_brought_are_facts() -> None:
    found = shares("w, h = image.size\nlongest = lengths.max().item()\ngrid = torch·arange(h)\n", ("image", "lengths"))
    assert found["w"] == found["h"] == found["longest"] == found["grid"] == Share.FACT


def test_a_repetition_written_with_a_tuple_doubles() -> None:
    assert Share.BRANCHES in shares("c = e.repeat((2,) + (1,) * (e.ndim - 1))\n", ("e",))["c"]
    assert Share.BRANCHES not in shares("c = e.repeat((1, 2))\n", ("e",))["c"]
