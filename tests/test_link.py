"""The address of the page: what is written is what is read, and what cannot be read is said."""

from __future__ import annotations

import json

import pytest

from ovam_core import InputError
from tabs.link import MAX_LINK, read, written

USUAL = {"prompt": "", "seed": 0, "steps": 25, "tau": 0.36, "crf": True, "beside": [], "grids": ["1/8"]}


def test_only_what_differs_is_written():
    values = {**USUAL, "prompt": "a cat, on grass", "tau": 0.5, "crf": False, "beside": ["DAAM", "GoCA, any word"]}
    link = written({**values, "beside": ["DAAM", "GoCA"]}, USUAL, ("prompt", "seed"))
    assert link == {"prompt": "a cat, on grass", "seed": "0", "tau": "0.5", "crf": "0", "beside": "DAAM,GoCA"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"seed": 4294967295, "steps": 1},
        {"tau": 0.0, "crf": False},
        {"tau": 1.0},
        {"tau": 0.00001},
        {"tau": 1234567.25},
        {"beside": ["DAAM", "GoCA"], "grids": []},
        {"prompt": "Ünïcode & = ? # 猫, 100 %"},
    ],
)
def test_there_and_back(values):
    values = {**USUAL, **values}
    found = read(json.dumps(written(values, USUAL)), USUAL)
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in values.items()}


def test_what_others_put_into_addresses_is_passed_over():
    assert read(json.dumps({"utm_source": "x", "seed": "3"}), USUAL) == {**USUAL, "seed": 3}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        '"seed"',
        '{"seed": 3}',
        '{"prompt": null}',
        "[" * 3000,
        '{"prompt": "' + "x" * MAX_LINK + '"}',
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(InputError, match="cannot be read"):
        read(text, USUAL)


@pytest.mark.parametrize("wrong", ["", "x", "1e999", "nan", "0x10", "1" * 40, "--1", "\uff11"])
def test_what_is_no_number(wrong):
    for name in ("seed", "tau"):
        with pytest.raises(InputError, match=f"{name} is '.*'; give a number"):
            read(json.dumps({name: wrong}), USUAL)
