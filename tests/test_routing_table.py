"""How experts correspond to accents: purity, mutual information and the summary of a corpus, computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import normalized_mutual_info_score

from hdmole.study.routing_table import correspondence, mutual_information, purity, routing_summary


def test_purity_and_mutual_information_by_hand() -> None:
    """Rows are accents, columns experts. Expert 0 serves 4 of its 6 utterances' main accent, expert 1 both of its own: 6 of 8."""
    counts = np.array([[4, 0], [0, 2], [2, 0]])
    experts, accents = (-sum(p * np.log(p) for p in shares) for shares in ((3 / 4, 1 / 4), (1 / 2, 1 / 4, 1 / 4)))
    assert purity(counts) == 6 / 8
    # the accent tells the expert, so that they share all that there is to know of the expert
    assert mutual_information(counts) == pytest.approx(experts / ((experts + accents) / 2)) == pytest.approx(0.702, abs=1e-3)
    several = np.array([[[3, 1], [1, 3]], [[2, 2], [2, 2]], [[4, 0], [0, 4]]])
    np.testing.assert_allclose(purity(several), [0.75, 0.5, 1.0])
    shared = 2 * 3 / 8 * np.log(3 / 2) + 2 * 1 / 8 * np.log(1 / 2)
    np.testing.assert_allclose(mutual_information(several), [shared / np.log(2), 0, 1], atol=1e-12)
    assert mutual_information(np.array([[5], [0]])) == 1  # one accent and one expert: nothing is unknown


def test_the_correspondence_of_a_corpus_has_intervals_over_speakers_and_a_level_of_chance() -> None:
    accents, speakers = np.repeat(["a", "b"], 20), np.tile(np.arange(10), 4).astype(str)
    perfect = correspondence(np.repeat([3, 5], 20), accents, speakers)
    assert perfect.purity.value == perfect.nmi.value == 1 and perfect.purity.interval == perfect.nmi.interval == (1, 1)
    # dealt at random among two, about 0.56: the larger of two shares is never below a half
    assert perfect.purity.chance == pytest.approx(0.56, abs=0.02) and 0 < (perfect.nmi.chance or 0) < 0.05
    nothing = correspondence(np.zeros(40, int), accents, speakers)
    assert (nothing.purity.value, nothing.purity.chance, nothing.nmi.value, nothing.nmi.chance) == (0.5, 0.5, 0, 0)
    # speakers differ: s0 to s4 are all right, s5 to s9 all on expert 3, so that draws lie between 0.5 and 1
    mixed = np.where((accents == "b") & (speakers < "5"), 5, 3)
    found = correspondence(mixed, accents, speakers).purity
    assert found.value == 0.75 and 0.5 < found.interval[0] < 0.65 < 0.85 < found.interval[1] < 1


def test_the_measure_of_random_experts_is_about_its_level_of_chance() -> None:
    """8 accents, 8 experts, 320 utterances: by chance 7 * 7 / (2 * 320) nats of log 8 (Miller 1955), which is 0.037."""
    assigned, accents = np.random.default_rng(0).integers(0, 8, 320), np.repeat(list("abcdefgh"), 40)
    found = correspondence(assigned, accents, np.arange(320) // 10).nmi
    assert found.value == pytest.approx(normalized_mutual_info_score(accents, assigned), abs=1e-4)
    assert found.chance == pytest.approx(49 / 640 / np.log(8), abs=0.005) and found.value == pytest.approx(found.chance, abs=0.02)
    assert found.interval[0] <= found.value <= found.interval[1]  # as biased as its draws


def test_the_routing_of_a_corpus_is_summarised_by_hand() -> None:
    """Two utterances, two layers, two experts; by the gate each goes to its own expert, by the local router both to "german"."""
    rows = [
        dict(domain=domain, utterance=spoken, spoken=spoken, speaker=spoken, layer=layer, layer_index=index, expert=k, accent=expert,
             gate=float(spoken == expert), global_gate=float(layer == "second" and spoken == expert), n_active=active,
             local_probability=0.9 if expert == "german" else 0.1)
        for domain, spoken, active in (("accent", "indian", 1.0), ("accent", "german", 2.0), ("general", "general", 0.5))
        for index, layer in ((1, "second"), (0, "first")) for k, expert in enumerate(("indian", "german"))
    ]  # fmt: skip
    found = routing_summary(pd.DataFrame(rows))
    assert found.utterances == 2
    assert found.active == {"accent": {"first": 1.5, "second": 1.5}, "general": {"first": 0.5, "second": 0.5}}
    assert list(found.routers) == ["gate", "global_gate", "local_probability"]
    assert {name: router.all.purity.value for name, router in found.routers.items()} == {
        "gate": 1, "global_gate": 1, "local_probability": 0.5,
    }  # fmt: skip
    by_layer = found.routers["global_gate"].layers
    assert list(by_layer) == ["first", "second"]
    assert [layer.purity.value for layer in by_layer.values()] == [0.5, 1] and by_layer["first"].nmi.value == 0
