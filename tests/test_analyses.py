"""The analyses of a comparison by small examples computed by hand, with their sign."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from torch import nn

from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.study.analyses import PER_ACCENT, Subject, attribution, chosen, log_likelihood, mean_rates, recogniser_results
from hdmole.training.adapt import Adaptation, Speech
from hdmole.training.data import Corpus, States, write_corpus


def speech_of(folder: Path, rows: list[tuple[str, str, str]], posteriors: np.ndarray | None = None) -> Speech:
    """Test speech of (accent, speaker, text), one frame an utterance; the recogniser knows the accents a and b."""
    index = pd.DataFrame(rows, columns=["accent", "speaker", "text"])
    index = index.assign(split="test", domain=["general" if a == "general" else "accent" for a in index.accent])
    index = index.assign(utterance=[f"u{i}" for i in range(len(rows))], seconds=1.0)
    write_corpus(folder, ((row, np.zeros((1, 80), np.float16)) for row in index.to_dict("records")))
    spans = np.array([[[i, 1] for i in range(len(rows))]])
    recogniser = AccentRecogniser(["general", "a", "b"], channels=4)
    return Speech(Corpus(folder), States(np.zeros((len(rows), 2), np.float16), spans), None, folder, recogniser, posteriors)


def two_experts() -> Any:
    """A linear layer from (1, 0) to a number: 2 times the weight of expert a less 1 times that of expert b."""
    config = HDMoLEConfig.extended(
        accents=["a", "b"], r=1, alpha=1, routing="global", thresholds="dense", shared_expert_rank=0, target_modules=["0"]
    )
    model: Any = get_peft_model(nn.Sequential(nn.Linear(2, 1, bias=False)), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.hdmole_A["default"].copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        layer.hdmole_B["default"].copy_(torch.tensor([[2.0, -1.0]]))
    return model.eval()


def test_attribution_is_the_change_in_log_likelihood_a_word_when_an_expert_is_left_out(tmp_path: Path) -> None:
    """Of two words each. Posteriors (0, 3/4, 1/4): 3/2 - 1/4 with both experts, -1/4 without a, 3/2 without b.

    Left out, a takes 3/2 from the likelihood and b gives 1/4 to it: -3/4 and 1/8 per word. In the accent b it is the other way
    round: -1/4 and 3/8. An expert that helps has a value below zero.
    """
    rows = [("a", "s1", "one two"), ("a", "s2", "one two"), ("b", "s3", "six ten")]
    posteriors = np.array([[0, 0.75, 0.25], [0, 0.75, 0.25], [0, 0.25, 0.75]], np.float32)
    speech, model = speech_of(tmp_path, rows, posteriors), two_experts()

    def likelihood(part: list[int]) -> np.ndarray:
        x = torch.tensor([[[1.0, 0.0]]]).expand(len(part), 1, 2)
        with torch.no_grad():
            return model(x, accent_posterior=torch.from_numpy(posteriors[part]))[:, 0, 0].double().numpy()

    assert likelihood([0, 2]).tolist() == pytest.approx([1.25, -0.25])
    found = attribution(Subject(model, speech, {}, lambda *args: pd.DataFrame(), likelihood, tmp_path))
    assert found["accents"] == ["a", "b"] and found["experts"] == ["a", "b"] and found["utterances"] == 3
    assert found["values"] == [[-0.75, 0.125], [-0.25, 0.375]]
    assert found["intervals"] == [[[-0.75, -0.75], [0.125, 0.125]], [[-0.25, -0.25], [0.375, 0.375]]]


def test_the_log_likelihood_is_the_sum_over_the_reference_and_its_end(tmp_path: Path) -> None:
    """Three tokens, of which the reference is one and the end (2) another; logits log 2 above the rest have probability 1/2."""
    speech = speech_of(tmp_path, [("a", "s", "x"), ("a", "s", "y z")], np.full((2, 3), 1 / 3, np.float32))
    ids = {"x": [1], "y z": [1, 0]}
    tokenizer: Any = lambda texts, add_special_tokens: {"input_ids": [ids[text] for text in texts]}  # noqa: E731
    speech = Speech(speech.corpus, speech.states, tokenizer, tmp_path, speech.recogniser, speech.posteriors)
    tokenizer.eos_token_id = 2

    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, encoder_states: torch.Tensor, encoder_mask: torch.Tensor, labels: torch.Tensor) -> Any:
            assert encoder_mask.all() and labels.tolist() == [[1, 2, -100], [1, 0, 2]]
            logits = torch.zeros(2, 1 + labels.shape[1] + 1, 3)
            logits[:, 1, 1] = math.log(2)  # predicts the first token
            return SimpleNamespace(logits=logits)

    found = log_likelihood(speech, Certain(), Adaptation("a", "hdmole"), [0, 1])
    assert found.tolist() == pytest.approx([math.log(1 / 2) + math.log(1 / 3), math.log(1 / 2) + 2 * math.log(1 / 3)], rel=1e-5)


def test_the_rate_of_a_domain_is_the_mean_over_accents_in_percent() -> None:
    """Accent a: 3 errors in 10 words over two utterances; b: 1 in 2. Their mean is 40, while the rate of all words is 33.3."""
    table = pd.DataFrame(
        [("accent", "a", 3, 4), ("accent", "a", 0, 6), ("accent", "b", 1, 2), ("general", "general", 1, 8)],
        columns=["domain", "accent", "errors", "words"],
    )
    assert mean_rates(table) == {"accent": 40.0, "general": 12.5}


def test_the_recognisers_balanced_accuracy_is_the_mean_over_accents(tmp_path: Path) -> None:
    """Of a, 2 in 3 are right; of b, 0 in 1; nothing general was said. The accent c has no class and does not count."""
    speech = speech_of(tmp_path, [(accent, "s", "x") for accent in ("a", "a", "a", "b", "c")])
    posteriors = np.array([[0, 0.75, 0.25], [0, 1, 0], [0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])
    found = recogniser_results(speech.corpus, ["general", "a", "b"], posteriors)
    assert found.confusion == [[0, 0, 0], [1, 2, 0], [0, 1, 0]]  # rows are what was spoken
    assert found.balanced_accuracy == pytest.approx(1 / 3, abs=1e-4) and found.mean_confidence == 0.8125


def test_the_first_utterances_of_each_accent_are_analysed(tmp_path: Path) -> None:
    rows = [("a", "s", "x")] * (PER_ACCENT + 5) + [("general", "s", "x")] * 3 + [("b", "s", "x")] * 2
    speech = speech_of(tmp_path, rows)
    assert chosen(speech, ("accent",)) == [*range(PER_ACCENT), PER_ACCENT + 8, PER_ACCENT + 9]
    assert len(chosen(speech)) == PER_ACCENT + 5
