"""Adapting the base: which parameters learn, at which rates, from which utterances, routed by which posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ACCENTS, tiny_corpus, tiny_speech
from torch import nn

from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.training import adapt as adapting
from hdmole.training.adapt import Adaptation, Speech, parameter_groups, training_rows
from hdmole.training.data import Batches
from hdmole.training.loop import smoothed_objective


def test_thresholds_learn_at_ten_times_the_rate_and_without_weight_decay() -> None:
    names = ["layer.hdmole_A.default", "layer.hdmole_threshold_local.default", "layer.hdmole_B.default"]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in names]
    slow, fast = parameter_groups(named, 0.002)
    assert [id(p) for p in slow["params"]] == [id(named[0][1]), id(named[2][1])] and set(slow) == {"params"}
    assert [id(p) for p in fast["params"]] == [id(named[1][1])]
    assert fast["lr"] == pytest.approx(0.02) and fast["weight_decay"] == 0
    assert len(parameter_groups([named[0]], 0.002)) == 1


def test_replay_exchanges_accented_for_general_speech_and_share_takes_some_of_it(tmp_path: Path) -> None:
    accented, general = list(range(20)), list(range(20, 30))
    rows = [("train", "accent", "german")] * 20 + [("train", "general", "general")] * 10
    corpus = tiny_corpus(tmp_path, [*rows, ("test", "accent", "german"), ("dev", "general", "general")], frames=1)
    assert training_rows(corpus, Adaptation("a", "full"), 0) == accented

    def counted(seed: int = 0, **changes: float) -> tuple[int, int]:
        found = training_rows(corpus, Adaptation("a", "full", **changes), seed)  # type: ignore[arg-type]
        assert len(set(found)) == len(found)
        return len(set(found) & set(accented)), len(set(found) & set(general))

    assert counted(replay=0.25) == (15, 5)  # as many as before, a quarter of them general
    assert counted(share=0.1) == (2, 0)
    assert counted(share=0.5, replay=0.2) == (8, 2)
    assert counted(replay=0.75) == (10, 10)  # no more than there is
    assert counted(share=0.001) == (1, 0)
    replayed = Adaptation("a", "full", replay=0.25)
    assert training_rows(corpus, replayed, 1) == training_rows(corpus, replayed, 1) != training_rows(corpus, replayed, 2)


@pytest.fixture
def accented(tmp_path: Path, tiny_model: Path) -> Speech:
    """8 accented and 4 general training utterances."""
    rows = [("train", "accent", ACCENTS[i % 3]) for i in range(8)] + [("train", "general", "general")] * 4
    return tiny_speech(tmp_path / "corpus", tiny_model, rows)


class _Fits:
    """Stands in for `fit`: keeps what it was called with, and what an HDMoLE layer's gate was then made of."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, batches: Batches, objective: Any, folder: Path, **rest: Any) -> None:
        rows = [i for batch in batches.batches for i in batch]
        layer = next((m for m in model.modules() if isinstance(m, HDMoLELinear)), None)
        config = None if layer is None else layer.configs["default"]
        call = {"rows": rows, "batch": batches[0], "folder": folder.name, "config": config, "objective": objective, **rest}
        self.calls.append({**call, "names": {id(p): name for name, p in model.named_parameters()}})


def adapted(speech: Speech, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> list[dict[str, Any]]:
    """The calls of `fit` when a method of a kind is trained for 2 epochs at a rate of 0.01."""
    fits, options = _Fits(), {"r": 1, "shared_expert_rank": 1} if kind == "hdmole" else {}
    monkeypatch.setattr(adapting, "fit", fits)
    adaptation = Adaptation("a", kind, options, **changes)
    adapting.adapt(speech, adaptation, folder / "adapter", epochs=2, rate=0.01, seed=0, report=print)
    return fits.calls


def test_an_adaptation_trains_thresholds_faster_on_the_accents(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = adapted(accented, tmp_path, monkeypatch, "hdmole")
    slow, fast = call["groups"]
    assert fast["lr"] == pytest.approx(0.1) and call["rate"] == 0.01 and fast["weight_decay"] == 0
    assert slow["params"] and all("threshold" not in call["names"][id(p)] for p in slow["params"])
    assert fast["params"] and all("threshold" in call["names"][id(p)] for p in fast["params"])
    assert sorted(call["rows"]) == list(range(8)) and call["epochs"] == 2 and call["folder"] == "adapter-training"
    assert call["objective"] is smoothed_objective and call["batch"]["accent_posterior"].tolist()[0] == [0.25] * 4
    assert call["config"].routing == "hierarchical"


def test_replay_and_share_reach_the_training(accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = adapted(accented, tmp_path, monkeypatch, "full", replay=0.25, share=0.5)
    assert len(call["rows"]) == 4 and len([i for i in call["rows"] if i >= 8]) == 1
    assert call["epochs"] == 4 and "accent_posterior" not in call["batch"]  # as many steps as with all of the speech


def test_a_warm_start_trains_each_expert_on_its_own_accent_first(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, rest = adapted(accented, tmp_path, monkeypatch, "hdmole", warm_share=0.25)
    assert (warm["folder"], warm["epochs"], rest["folder"], rest["epochs"]) == ("adapter-warming", 0.5, "adapter-training", 1.5)
    assert (warm["config"].routing, warm["config"].thresholds, warm["config"].shared_expert_rank) == ("global", "dense", 0)
    assert (rest["config"].routing, rest["config"].thresholds, rest["config"].shared_expert_rank) == (
        "hierarchical",
        "relu",
        1,
    )
    assert warm["batch"]["accent_posterior"].amax(1).tolist() == [1.0] * 8  # the accent that was spoken
    assert warm["batch"]["accent_posterior"].argmax(1).bincount().tolist() == [0, 3, 3, 2]
    assert rest["batch"]["accent_posterior"].tolist() == [[0.25] * 4] * 8


def test_training_hears_both_masked_views_of_an_utterance(accented: Speech) -> None:
    batches, views = accented.batches(list(range(8)), 0, lambda rows: {}), []
    for epoch in range(12):
        batches.epoch = epoch
        heard = batches[0]["encoder_states"][:, 0, 0] // 100
        assert heard.tolist() == (batches[0]["encoder_states"][:, 0, 0] // 100).tolist()  # the same within an epoch
        views.append(heard)
    share = torch.stack(views).mean(0)
    assert (share > 0).all() and (share < 1).all()  # of each utterance now one, now the other
