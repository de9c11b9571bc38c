"""Deep links: what `write` puts into the address, the pages read back, whatever the names are."""

from __future__ import annotations

from urllib.parse import parse_qs, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import links

NAMES = st.text(st.characters(exclude_categories=["Cs"]))  # halves of a character cannot stand in an address
LISTS = st.lists(NAMES.filter(bool), min_size=1)


def opened(address: dict[str, str]) -> dict[str, str]:
    """What Streamlit gives of an address: the last value of each name."""
    return {name: values[-1] for name, values in parse_qs(urlencode(address), keep_blank_values=True).items()}


@given(NAMES, NAMES, LISTS)
def test_what_an_address_is_written_of_is_read_back(sample: str, layer: str, experts: list[str]) -> None:
    found = opened(links.address({"sample": sample, "layer": layer, "mask": experts, "force": []}))
    assert found.get("sample", "") == sample and found.get("layer", "") == layer
    assert links.names_in(found["mask"]) == experts and "force" not in found


@given(st.floats(0, 1))
def test_a_number_is_read_back_and_kept_in_its_range(value: float) -> None:
    text = opened(links.address({"p": f"{value:g}"}))["p"]
    assert links.number_in(text, 0.9, 0, 1) == pytest.approx(value, rel=1e-5)
    assert links.number_in(text, 0.9, 0.4, 0.6) == pytest.approx(min(max(value, 0.4), 0.6), rel=1e-5)


def test_addresses_of_plain_names_are_plain() -> None:
    assert links.address({"mask": ["indian", "german"], "accent": ""}) == {"mask": "indian,german"}
    assert links.joined(["a,b", 'c"d']) == '"a,b","c""d"'


@pytest.mark.parametrize("text", ["", '"', '"a', '"a"b', "a\nb"])
def test_what_was_not_written_here_names_nothing(text: str) -> None:
    assert links.names_in(text) == []


@pytest.mark.parametrize("text", [None, "", "nan", "inf", "-inf", "two"])
def test_what_is_no_number_is_the_default(text: str | None) -> None:
    assert links.number_in(text, 0.9, 0, 1) == 0.9


@given(NAMES)
def test_reading_never_fails(text: str) -> None:
    assert all(isinstance(name, str) for name in links.names_in(text))
    assert 0 <= links.number_in(text, 0.5, 0, 1) <= 1
