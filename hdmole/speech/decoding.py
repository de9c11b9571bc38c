"""Decoding: from encoder outputs to texts, and to words with times and confidences.

`token_log_probs` and `word_log_probs` say how likely a given text is.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hdmole.method.routing import route
from hdmole.speech.alignment import align
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.loading import ModelError


@dataclass(frozen=True)
class Decoded:
    """What the LLM wrote for one segment."""

    text: str
    ids: list[int]
    log_probs: list[float]  # of each token in nats, including the end token
    # start and end of each text token in seconds from the segment's first sample, where the model
    # itself knows them
    times: list[tuple[float, float]] | None = None
    english: float | None = None  # probability that English is spoken, where the model tells languages apart


@dataclass(frozen=True)
class Encoded:
    """One segment of a recording, ready for every method."""

    samples: np.ndarray  # (S,) 16 kHz, the sound alone (`hdmole.speech.segments.framed`)
    # second of the recording at which the samples begin; negative if silence was added before it
    offset: float
    states: Tensor  # (T, d_encoder)
    ctc: Tensor | None  # (T, vocabulary) log-probabilities; None if the model has no CTC head
    posterior: Tensor  # (N + 1,), by the recogniser of the model or of its first HDMoLE adapter
    base: Decoded | None = None  # what the frozen base hears; None if it has not decoded this yet
    until: float = float("inf")  # second of the recording at which the sound ends
    # (T_mel, n_mels); kept only if a method has an encoder of its own
    features: Tensor | None = None
    spoken: bool = True  # false if nobody speaks in it; no words are then heard
    # by method: the posterior by each HDMoLE adapter's own recogniser
    posteriors: dict[str, Tensor] = field(default_factory=dict)

    def posterior_of(self, method: str) -> Tensor:
        """The posterior (N + 1,) by the recogniser of a method, or that of the first adapter."""
        return self.posteriors.get(method, self.posterior)

    @property
    def seconds(self) -> float:
        """Length of the samples in seconds."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class Word:
    """A word, its start and end in seconds, and the LLM's probability of its tokens.

    Start and end are NaN where nothing says when the word was said.
    """

    word: str
    start: float
    end: float
    confidence: float


@torch.no_grad()
def greedy(model: Any, states: list[Tensor], tokenizer: Any, posterior: Tensor | None = None) -> list[Decoded]:
    """Greedy transcripts with the log-probability of every token.

    `states` are the encoder outputs (T, d_encoder) of U utterances. `posterior` (U, N + 1) routes
    an HDMoLE model; other models need none. Raises ModelError if the model computes NaN.
    """
    padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
    lengths = torch.tensor([len(s) for s in states], device=padded.device)
    mask = torch.arange(padded.shape[1], device=padded.device)[None] < lengths[:, None]
    with nullcontext() if posterior is None else route(posterior):
        found = model.decode(padded, mask)
    if any(math.isnan(score) for _, scores, *_ in found for score in scores):
        sentence = (
            "From this sound the model computes values that are no numbers, so its weights are damaged; copy the model again."
        )
        raise ModelError("model.computes_no_numbers", sentence)
    return [Decoded(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ids, *told) for ids, *told in found]


@torch.no_grad()
def token_log_probs(model: Any, states: list[Tensor], ids: list[list[int]], posterior: Tensor) -> Tensor:
    """Log-probabilities (U, L) in nats of given tokens, each after those before it.

    They are 0 where the text of an utterance has ended. `states` are the encoder outputs
    (T, d_encoder) of U utterances, `ids` the tokens of each with its end token, and `posterior`
    (U, N + 1) routes an HDMoLE model.
    """
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(s), dtype=torch.bool, device=s.device) for s in states], batch_first=True)
    texts = [torch.tensor(text, device=posterior.device) for text in ids]
    labels = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    with route(posterior):
        out = model(encoder_states=nn.utils.rnn.pad_sequence(states, batch_first=True), encoder_mask=mask, labels=labels)
    scores = out.logits[:, -labels.shape[1] - 1 : -1].float().log_softmax(-1)
    picked: Tensor = scores.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
    return picked


def ctc_text(log_probs: Tensor, tokenizer: Any, blank: int) -> str:
    """What the CTC head alone hears, by greedy decoding.

    It takes the best token of each frame of `log_probs` (T, vocabulary) and leaves out repetitions
    and blanks.
    """
    kept = torch.unique_consecutive(log_probs.argmax(-1))
    return str(tokenizer.decode(kept[kept != blank], skip_special_tokens=True)).strip()


def word_tokens(ids: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """Which tokens spell which word. It works for every way in which tokenizers mark a new word.

    Returns:
        The indices in `ids` of the tokens that are text, and each word with the indices of its
        tokens in that list.
    """
    special = set(tokenizer.all_special_ids)
    tokens = [k for k, i in enumerate(ids) if i not in special]
    words = str(tokenizer.decode([ids[k] for k in tokens])).split()
    found: list[list[int]] = [[] for _ in words]
    for n in range(len(tokens)):  # a token belongs to the last word of the text up to it
        text = str(tokenizer.decode([ids[k] for k in tokens[: n + 1]]))
        if words:
            found[min(max(0, len(text.split()) - 1), len(words) - 1)].append(n)
    return tokens, [(word, numbers) for word, numbers in zip(words, found, strict=True) if numbers]


def word_log_probs(model: Any, states: Tensor, ids: list[int], posterior: Tensor, tokenizer: Any) -> list[float]:
    """The log-probability of each word of a given text, in nats: the sum over the word's tokens.

    `states` are the encoder outputs (T, d_encoder) of an utterance, `ids` the text's tokens with
    the end token, and `posterior` (1, N + 1) routes an HDMoLE model.
    """
    scores: list[float] = token_log_probs(model, [states], [ids], posterior)[0].tolist()
    tokens, groups = word_tokens(ids, tokenizer)
    return [sum(scores[tokens[k]] for k in numbers) for _, numbers in groups]


def timed_words(segment: Encoded, heard: Decoded, tokenizer: Any, blank: int | None, step: float) -> tuple[list[Word], str]:
    """The words heard in a segment, with their times in the recording and their confidences.

    Args:
        segment: the segment.
        heard: what was heard in it.
        tokenizer: tokenizer of the LLM.
        blank: id of the CTC head's blank; None if the model has none.
        step: length of a frame of the CTC head in seconds.

    Returns:
        The words, and where their times come from. "attention" stands for the model's own
        cross-attention, "ctc" for an alignment to the CTC head. "uniform" means that the tokens do
        not fit into its frames, so that each token gets an equal share of the segment. "none" means
        that the model has neither, so that words have no times.
    """
    tokens, groups = word_tokens(heard.ids, tokenizer)
    aligned, spans = None, []
    known = segment.ctc is not None and blank is not None
    if not groups:
        return [], "attention" if heard.times is not None else "ctc" if known else "none"
    if segment.ctc is not None and blank is not None:
        aligned = align(segment.ctc, [heard.ids[k] for k in tokens], blank)
    if heard.times is not None:
        spans, timing = heard.times, "attention"
    elif not known:
        timing = "none"
    elif aligned is None:
        width = segment.seconds / len(tokens)
        spans, timing = [(k * width, (k + 1) * width) for k in range(len(tokens))], "uniform"
    else:
        spans, timing = [(a * step, (b + 1) * step) for a, b in aligned[0]], "ctc"
    words = []
    for word, found in groups:
        confidence = round(float(np.exp(sum(heard.log_probs[tokens[n]] for n in found))), 4)
        if timing == "none":
            words.append(Word(word, math.nan, math.nan, confidence))
            continue
        times = spans[found[0]][0] + segment.offset, spans[found[-1]][1] + segment.offset
        start, end = (min(max(0.0, t), segment.until) for t in times)
        words.append(Word(word, round(start, 3), round(end, 3), confidence))
    return words, timing
