"""What an address keeps: Back, a reload and a link lead to the choices and recordings that it names."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from driver import assert_no_exception, in_brackets, session, settle, wav
from streamlit.testing.v1 import AppTest

from app import clips
from app.jobs import Utterance


def address(at: AppTest) -> dict[str, str]:
    """The address of the page that is shown."""
    return {name: value[-1] if isinstance(value, list) else value for name, value in at.query_params.items()}


def go_back(at: AppTest, former: dict[str, str]) -> AppTest:
    """Open an address in the same session, as the browser's Back does."""
    session(at).written_at -= 1  # in a browser, nobody is that fast
    at.query_params.clear()
    at.query_params.update(former)
    return settle(at.run())


def test_back_undoes_the_choice_of_a_layer_and_of_a_sample(open_app: Callable[..., AppTest]) -> None:
    at = open_app("routing", sample="indian_1")
    first = address(at)
    other = in_brackets(at.selectbox(key="layer").options[1])
    settle(at.selectbox(key="layer").set_value(other).run())
    second = address(at)
    settle(at.selectbox(key="sample_choice").set_value("german_1").run())
    assert address(at)["sample"] == "german_1" and address(at)["layer"] == second["layer"] == other != first["layer"]
    go_back(at, second)
    assert session(at).utterance.sample == "indian_1" and address(at) == second
    go_back(at, first)
    assert_no_exception(at)
    assert address(at) == first and at.selectbox(key="sample_choice").value == "indian_1"


def test_back_undoes_a_change_of_routing_and_a_reload_keeps_it(open_app: Callable[..., AppTest]) -> None:
    at = open_app("thresholds", sample="indian_1")
    first = address(at)
    experts = at.multiselect(key="change_mask-hdmole").options
    settle(at.multiselect(key="change_mask-hdmole").set_value(["indian"]).run())
    assert len(experts) > 1 and address(at)["mask"] == "indian"
    masked = address(at)
    (slider,) = (slider for slider in at.slider if str(slider.key).startswith("tau_local"))
    settle(slider.set_value(0.2).run())
    assert address(at) == masked | {"tau_local": "0.2"}
    again = open_app("thresholds", **address(at))
    assert address(again) == address(at)
    go_back(at, masked)
    assert address(at) == masked and at.multiselect(key="change_mask-hdmole").value == ["indian"]
    go_back(at, first)
    assert_no_exception(at)
    assert address(at) == first and at.multiselect(key="change_mask-hdmole").value == []


def test_an_upload_and_its_typed_words_are_there_after_a_reload(
    open_app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = open_app()
    at.segmented_control(key="way").set_value("Upload").run()
    settle(at.file_uploader(key="upload").upload("mine.wav", wav(), "audio/wav").run())
    settle(at.text_input[0].set_value("Turn on the lights!").run())
    link = address(at)
    again = open_app(**link)
    assert_no_exception(again)
    assert session(again).utterance.name == "mine.wav" and again.text_input[0].value == "Turn on the lights!"
    assert address(again) == link
    monkeypatch.setattr(clips, "KEPT", 0.0)
    lost = open_app(**link)
    assert "is not kept any more" in lost.warning[0].value and session(lost).utterance.sample


def test_recordings_are_kept_for_a_time_and_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "_clips", {})
    monkeypatch.setattr(clips, "MOST_BYTES", 25)
    one, other = (clips.keep(Utterance(name, bytes(10))) for name in ("one.wav", "other.wav"))
    assert one.clip != other.clip and len(one.clip) >= 16
    assert clips.find(one.clip) == one  # and so it was used last
    third = clips.keep(Utterance("third.wav", bytes(10)))
    assert clips.find(other.clip) is None and clips.find(one.clip) == one and clips.find(third.clip) == third
    now = time.monotonic()
    monkeypatch.setattr(clips.time, "monotonic", lambda: now + clips.KEPT + 1)
    assert clips.find(one.clip) is None
