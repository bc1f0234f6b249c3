"""What is known of a value that is one or the other."""

import itertools

import pytest

from porter.specialise.values import (
    GIVEN,
    NONE,
    TOP,
    Const,
    Empty,
    Items,
    ListOf,
    OneOf,
    Opaque,
    element,
    is_none,
    join,
    truth,
)

A, B = Opaque("a.A"), Opaque("b.B")
ALL = [NONE, TOP, GIVEN, Const(1), Const(True), Const(""), Empty(), A, B, OneOf((A, B)), OneOf((A,), True),
       Items(()), Items((A,)), Items((A, NONE)), ListOf(B), ListOf(GIVEN)]  # fmt: skip
PAIRS = list(itertools.product(ALL, ALL))


@pytest.mark.parametrize("value", ALL)
def test_a_value_joined_with_itself_stays_as_it_is(value):
    assert join(value, value) == value


def test_joining_claims_no_truth_that_one_side_denies():
    wrong = [
        (a, b) for a, b in PAIRS if truth(join(a, b)) is not None and truth(join(a, b)) not in (truth(a), truth(b))
    ]
    assert wrong == []


def test_which_side_comes_first_decides_nothing_about_none():
    assert [(a, b) for a, b in PAIRS if is_none(join(a, b)) != is_none(join(b, a))] == []


def test_none_or_something_given_is_not_something_given():
    assert join(NONE, GIVEN) == TOP
    assert join(Const(1), NONE) == TOP


def test_two_constants_are_no_constant():
    assert join(Const(1), Const(2)) == GIVEN


def test_a_choice_of_modules_keeps_both_and_remembers_none():
    assert join(A, B) == OneOf((A, B))
    assert join(join(A, B), NONE) == OneOf((A, B), nullable=True)


def test_a_module_that_may_be_missing_is_not_taken_for_present():
    assert truth(join(A, NONE)) is None
    assert is_none(join(A, NONE)) is None


def test_an_empty_list_that_is_filled_elsewhere_is_not_empty():
    assert join(Empty(), Items((A,))) == ListOf(A)
    assert truth(join(Empty(), ListOf(A))) is None


def test_sequences_of_one_length_are_joined_element_by_element():
    assert join(Items((A, NONE)), Items((A, Const(1)))) == Items((A, TOP))


def test_sequences_of_two_lengths_have_no_known_length():
    assert join(Items((A,)), Items((A, A))) == ListOf(A)


def test_something_given_is_neither_true_nor_false():
    assert truth(GIVEN) is None and truth(TOP) is None
    assert is_none(GIVEN) is False and is_none(TOP) is None


def test_the_element_of_an_empty_sequence_is_anything():
    assert element(Items(())) == TOP


def test_joining_does_not_forget_that_one_side_may_be_none():
    wrong = [(a, b) for a, b in PAIRS if is_none(join(a, b)) is not None and None in (is_none(a), is_none(b))]
    assert wrong == []


def test_a_list_that_is_given_may_hold_none():
    assert is_none(element(GIVEN)) is None
