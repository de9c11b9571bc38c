"""From a model's numbers to texts, words, their times and how likely they are, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hdmole.models.speech_llm import SpeechLLM
from hdmole.speech.decoding import (
    Decoded,
    Encoded,
    Word,
    ctc_text,
    greedy,
    timed_words,
    token_log_probs,
    word_log_probs,
    word_tokens,
)


def test_words_of_any_tokenizer() -> None:
    """Words come from the text, whichever way a tokenizer marks where one begins."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<a>", "<b>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["über allen gipfeln"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<b>")
    ids = tokenizer.encode("über kühe ruh")
    tokens, groups = word_tokens([*ids, tokenizer.eos_token_id], tokenizer)
    assert tokens == list(range(len(ids))) and [word for word, _ in groups] == ["über", "kühe", "ruh"]
    assert [n for _, found in groups for n in found] == tokens


class Letters:
    """A tokenizer of six tokens: a blank, the end, a space and three letters."""

    all_special_ids, pad_token_id, eos_token_id = [0, 1], 0, 1

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join("__ abc"[int(i)] for i in ids if not (skip_special_tokens and i < 2))


def heard_in_frames(*best: int) -> torch.Tensor:
    """CTC log-probabilities in which each frame has one likely token."""
    scores = torch.full((len(best), 6), -9.0)
    scores[torch.arange(len(best)), torch.tensor(best)] = 0.0
    return scores


def test_words_have_the_times_of_their_tokens_and_the_probability_of_all() -> None:
    """ "ab c" in eight frames of 0.1 s, in a segment that begins 2 s into the recording and whose sound ends at 2.75 s."""
    ctc = heard_in_frames(0, 3, 3, 4, 2, 0, 0, 5)
    nothing = torch.zeros(0)
    segment = Encoded(np.zeros(12_800, np.float32), 2.0, nothing, ctc, nothing, until=2.75)
    heard = Decoded("ab c", [3, 4, 2, 5, 1], [-0.1, -0.2, -0.3, -0.5, -7.0])
    assert ctc_text(ctc, Letters(), 0) == "ab c"
    assert word_tokens(heard.ids, Letters()) == ([0, 1, 2, 3], [("ab", [0, 1, 2]), ("c", [3])])  # the space ends a word
    words, timing = timed_words(segment, heard, Letters(), 0, 0.1)
    # frames 1 to 4 and 7: 0.1 to 0.5 s and 0.7 to 0.8 s, cut off where the sound ends; exp(-0.6) and exp(-0.5)
    assert words == [Word("ab", 2.1, 2.5, 0.5488), Word("c", 2.7, 2.75, 0.6065)] and timing == "ctc"
    early = Encoded(segment.samples, -0.15, nothing, ctc, nothing, until=0.6)
    assert [(w.start, w.end) for w in timed_words(early, heard, Letters(), 0, 0.1)[0]] == [(0.0, 0.35), (0.55, 0.6)]


def test_words_that_fit_into_no_frames_share_the_segment() -> None:
    nothing = torch.zeros(0)
    segment = Encoded(np.zeros(12_800, np.float32), 1.0, nothing, heard_in_frames(3, 5), nothing)
    words, timing = timed_words(segment, Decoded("ab c", [3, 4, 2, 5], [-1.0] * 4), Letters(), 0, 0.1)
    assert timing == "uniform" and [(w.word, w.start, w.end) for w in words] == [("ab", 1.0, 1.6), ("c", 1.6, 1.8)]
    assert timed_words(segment, Decoded("", [1], [-0.1]), Letters(), 0, 0.1) == ([], "ctc")


def test_greedy_decoding_ends_at_the_end_and_keeps_its_probability() -> None:
    logits = torch.zeros(2, 3, 6)  # two utterances, three steps
    logits[0, 0, 3] = logits[0, 1, 1] = logits[1, 0, 4] = logits[1, 1, 2] = logits[1, 2, 5] = 2.0

    class Model:
        config = SimpleNamespace(text_config=SimpleNamespace(eos_token_id=1, pad_token_id=0))
        decode = SpeechLLM.decode

        def generate(self, encoder_states: torch.Tensor, encoder_mask: torch.Tensor, **options: Any) -> Any:
            assert encoder_states.shape == (2, 3, 4) and encoder_mask.tolist() == [[True] * 3, [True, False, False]]
            assert options["max_new_tokens"] == 12 and options["do_sample"] is False  # 8 and one and a half a frame
            sequences = logits.argmax(-1)
            return type("Out", (), {"sequences": sequences, "logits": list(logits.unbind(1))})()

    one, other = greedy(Model(), [torch.zeros(3, 4), torch.zeros(1, 4)], Letters())
    likely = 2 - np.log(np.exp(2) + 5)  # log-probability of a token whose logit is 2 among five of 0
    assert (one.text, one.ids) == ("a", [3, 1]) and one.log_probs == pytest.approx([likely] * 2)
    assert (other.text, other.ids) == ("b c", [4, 2, 5]) and other.log_probs == pytest.approx([likely] * 3)


def test_a_given_text_is_as_likely_as_its_tokens_after_each_other() -> None:
    """Two texts, of three tokens and of one. A token is foretold one place before it stands."""
    logits = torch.zeros(2, 6, 6)  # two frames of sound, three tokens, and what follows the last
    logits[0, 2, 3] = logits[0, 3, 2] = logits[1, 2, 5] = 2.0
    given: list[Any] = []

    def model(encoder_states: torch.Tensor, encoder_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        given.append((encoder_mask.tolist(), labels.tolist()))
        return SimpleNamespace(logits=logits[: len(labels)])

    two, one = torch.zeros(2, 4), torch.zeros(1, 4)
    found = token_log_probs(model, [two, one], [[3, 2, 4], [5]], torch.ones(2, 1))
    assert given == [([[True, True], [True, False]], [[3, 2, 4], [5, -100, -100]])]
    likely, even = 2 - np.log(np.exp(2) + 5), -np.log(6)  # logit 2 among five of 0, and six of 0
    np.testing.assert_allclose(found, [[likely, likely, even], [likely, 0, 0]], rtol=1e-6)
    words = word_log_probs(model, two, [3, 2, 4], torch.ones(1, 1), Letters())
    assert words == pytest.approx([2 * likely, even])  # "a" with the space after it, and "b"
