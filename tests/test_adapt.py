"""Adapting the base: which parameters learn, at which rates, from which utterances, routed by which posterior."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ACCENTS, tiny_corpus, tiny_speech
from torch import nn

from hdmole.method.routing import current
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.training import adapt as adapting
from hdmole.training.adapt import MIXTURES, Adaptation, AdaptationError, Speech, parameter_groups, training_rows
from hdmole.training.data import Batches
from hdmole.training.loop import smoothed_objective


def test_parameters_learn_at_the_rate_of_their_kind() -> None:
    names = [
        "hdmole_A.default",
        "hdmole_threshold.default",
        "hdmole_B.default",
        "hdmole_router.default",
        "hdmole_threshold_weight.a",
    ]
    named = [(f"layer.{name}", nn.Parameter(torch.zeros(1))) for name in names]
    adaptation = Adaptation("a", "hdmole", threshold_rate=10, router_rate=0.5)
    experts, thresholds, routers = parameter_groups(named, 0.002, adaptation)
    assert [id(p) for p in experts["params"]] == [id(named[0][1]), id(named[2][1])] and set(experts) == {"params"}
    assert [id(p) for p in thresholds["params"]] == [id(named[1][1])]
    assert thresholds["lr"] == pytest.approx(0.02) and thresholds["weight_decay"] == 0  # thresholds do not decay
    assert [id(p) for p in routers["params"]] == [id(named[3][1]), id(named[4][1])]
    assert routers["lr"] == pytest.approx(0.001) and set(routers) == {"params", "lr"}
    assert len(parameter_groups([named[0]], 0.002, adaptation)) == 1
    for wrong in ({"threshold_rate": 0}, {"router_rate": -1}):
        with pytest.raises(AdaptationError, match="factors above 0"):
            Adaptation("a", "hdmole", **wrong)  # type: ignore[arg-type]
    with pytest.raises(AdaptationError, match="train_with is one of recogniser, accent; not 'label'"):
        Adaptation("a", "hdmole", train_with="label")


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
    fits, options = _Fits(), {"r": 1, "shared_expert_rank": 1} if kind in MIXTURES else {}
    monkeypatch.setattr(adapting, "fit", fits)
    adaptation = Adaptation("a", kind, {**options, **changes.pop("options", {})}, **changes)
    adapting.adapt(speech, adaptation, folder / "adapter", epochs=2, rate=0.01, seed=0, report=print)
    return fits.calls


def test_thresholds_and_routers_have_rates_of_their_own(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"options": {"threshold_parametrisation": "input"}, "threshold_rate": 10, "router_rate": 0.5}
    (call,) = adapted(accented, tmp_path, monkeypatch, "extended", **changes)
    experts, thresholds, routers = call["groups"]
    names = [{call["names"][id(p)].split(".")[-2] for p in group["params"]} for group in call["groups"]]
    assert names[0] == {"hdmole_A", "hdmole_B", "hdmole_shared_A", "hdmole_shared_B"}
    assert names[1:] == [{"hdmole_threshold"}, {"hdmole_router", "hdmole_threshold_weight"}]
    assert call["rate"] == 0.01 and "lr" not in experts
    assert thresholds["lr"] == pytest.approx(0.1) and thresholds["weight_decay"] == 0
    assert routers["lr"] == pytest.approx(0.005) and "weight_decay" not in routers
    assert sorted(call["rows"]) == list(range(8)) and call["epochs"] == 2 and call["folder"] == "adapter-training"
    assert call["objective"] is smoothed_objective and call["batch"]["accent_posterior"].tolist()[0] == [0.25] * 4
    assert call["config"].routing == "hierarchical"


def test_the_papers_method_and_ours_are_two_kinds(accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (paper,) = adapted(accented, tmp_path / "paper", monkeypatch, "hdmole", options={"r": 3})
    (ours,) = adapted(accented, tmp_path / "ours", monkeypatch, "extended", options={"r": 3})
    (louder,) = adapted(accented, tmp_path / "louder", monkeypatch, "hdmole", options={"r": 3, "alpha": 24.0})
    assert (paper["config"].thresholds, paper["config"].scale, paper["config"].router_input) == ("dynamic", 1, "x")
    assert (ours["config"].thresholds, ours["config"].scale, ours["config"].general_class) == ("relu", 8, True)
    assert louder["config"].scale == 8 and not paper["muon"]
    (muon,) = adapted(accented, tmp_path / "muon", monkeypatch, "hdmole", muon=True)
    assert muon["muon"]


def test_experts_learn_by_the_true_accent_and_auxiliary_losses_count(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = adapted(accented, tmp_path / "ear", monkeypatch, "hdmole", train_with="accent")
    assert call["batch"]["accent_posterior"].amax(1).tolist() == [1.0] * 8
    method = Adaptation("a", "hdmole", {"r": 1}, train_with="accent")
    assert accented.posterior([0, 1], method).tolist() == [[0.25] * 4] * 2  # afterwards by the recogniser
    by_other = replace(method, recogniser="other")
    assert accented.recogniser is not None
    speech = replace(accented, others={"other": (accented.recogniser, np.eye(4)[[1] * 12])})
    assert speech.posterior([0], by_other).tolist() == [[0, 1, 0, 0]]

    options = {"routing": "local", "thresholds": "dense", "auxiliary_loss": "accent"}
    (call,) = adapted(accented, tmp_path / "moa", monkeypatch, "hdmole", options=options)
    monkeypatch.setattr(adapting, "smoothed_objective", lambda model, batch: losses_of(torch.tensor(2.0)))

    def losses_of(value: torch.Tensor) -> torch.Tensor:
        current().losses.extend([torch.tensor(3.0), torch.tensor(5.0)])  # type: ignore[union-attr]
        return value

    assert float(call["objective"](None, {})) == pytest.approx(2.08)  # a hundredth of each layer's


def test_replay_and_share_reach_the_training(accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = adapted(accented, tmp_path, monkeypatch, "full", replay=0.25, share=0.5)
    assert len(call["rows"]) == 4 and len([i for i in call["rows"] if i >= 8]) == 1
    assert call["epochs"] == 4 and "accent_posterior" not in call["batch"]  # as many steps as with all of the speech


def test_a_warm_start_trains_each_expert_on_its_own_accent_first(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, thresholds, first in (("hdmole", "dynamic", "dynamic"), ("extended", "relu", "dense")):
        warm, rest = adapted(accented, tmp_path / kind, monkeypatch, kind, warm_share=0.25)
        assert (warm["folder"], warm["epochs"]) == ("adapter-warming", 0.5)
        assert (rest["folder"], rest["epochs"]) == ("adapter-training", 1.5)
        config = warm["config"]
        assert (config.routing, config.thresholds, config.shared_expert_rank) == ("global", first, 0)
        config = rest["config"]
        assert (config.routing, config.thresholds, config.shared_expert_rank) == ("hierarchical", thresholds, 1)
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
