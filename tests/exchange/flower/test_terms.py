import json

import pytest

from fedmoe.exchange.flower.terms import Terms

TERMS = Terms("0a1b", "0a1b.7", "demo", "fedmoe", 3, 20, {"alpha": 0.5}, "d" * 16, "p" * 16)


def changed(**changes):
    return json.dumps(json.loads(TERMS.text) | changes)


def test_terms_are_read_as_they_were_written():
    assert Terms.read(TERMS.text) == TERMS


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "terms must be JSON"),
        ("[" * 60000, "terms must be JSON"),
        ("[]", "terms must be an object, got list"),
        ("{}", "'arguments' is missing"),
        (changed(extra=1), "'extra' is none of them"),
        (changed(seed="3"), "terms: seed must be of type int, got '3'"),
        (changed(seed=True), "terms: seed must be of type int, got True"),
        (changed(seed=-1), "terms: seed must be 0 or more and below 2\\*\\*32, got -1"),
        (changed(rounds=0), "terms: rounds must be at least 1, got 0"),
        (changed(arguments=[]), "terms: arguments must be of type dict"),
        (changed(method=None), "terms: method must be of type str, got None"),
        (changed(key="../../etc"), "terms: key must be 1 to 64 small letters and digits"),
        (changed(key=""), "terms: key must be 1 to 64 small letters and digits"),
        (changed(target="x" * 70000), "terms must be at most 65536 characters"),
    ],
)
def test_what_are_no_terms_is_refused_by_name(text, words):
    with pytest.raises(ValueError, match=words):
        Terms.read(text)
