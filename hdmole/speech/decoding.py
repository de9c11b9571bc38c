"""Decoding: from encoder outputs to texts, and from texts to words with their times and confidences."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hdmole.method.routing import route
from hdmole.speech.alignment import align
from hdmole.speech.audio import SAMPLE_RATE


@dataclass(frozen=True)
class Decoded:
    """What the LLM wrote for one segment."""

    text: str
    ids: list[int]
    log_probs: list[float]  # of each token in nats, the closing one among them


@dataclass(frozen=True)
class Encoded:
    """One segment of a recording, ready for every method."""

    samples: np.ndarray  # (S,) 16 kHz, the sound alone (`hdmole.speech.segments.framed`)
    offset: float  # seconds into the recording at which the samples begin; below 0 where silence was added before it
    states: Tensor  # (T, d_encoder)
    ctc: Tensor  # (T, vocabulary) log-probabilities
    posterior: Tensor  # (N + 1,)
    base: Decoded | None = None  # what the frozen base hears; None where it was not asked yet
    until: float = float("inf")  # seconds into the recording at which the sound ends
    features: Tensor | None = None  # (T_mel, n_mels); kept where a method has an encoder of its own

    @property
    def seconds(self) -> float:
        """Length of the samples in seconds."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class Word:
    """A word, its start and end in seconds, and the LLM's probability of its tokens."""

    word: str
    start: float
    end: float
    confidence: float


@torch.no_grad()
def greedy(model: Any, states: list[Tensor], tokenizer: Any, posterior: Tensor | None = None) -> list[Decoded]:
    """Greedy transcripts of encoder outputs (T, d_encoder) each, with the log-probability of every token.

    `posterior` (U, N + 1) routes an HDMoLE model; other models need none.
    """
    padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
    lengths = torch.tensor([len(s) for s in states], device=padded.device)
    mask = torch.arange(padded.shape[1], device=padded.device)[None] < lengths[:, None]
    with nullcontext() if posterior is None else route(posterior):
        out = model.generate(
            encoder_states=padded, encoder_mask=mask, max_new_tokens=int(8 + 1.5 * int(lengths.max())), do_sample=False,
            pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    log_probs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, out.sequences[..., None])[..., 0]
    decoded = []
    for ids, scores in zip(out.sequences.tolist(), log_probs.tolist(), strict=True):
        length = next((i + 1 for i, t in enumerate(ids) if t == tokenizer.eos_token_id), len(ids))
        text = str(tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()
        decoded.append(Decoded(text, ids[:length], scores[:length]))
    return decoded


def ctc_text(log_probs: Tensor, tokenizer: Any, blank: int) -> str:
    """What the CTC head alone hears: the best token of each of the frames (T, vocabulary), repetitions and blanks left out."""
    kept = torch.unique_consecutive(log_probs.argmax(-1))
    return str(tokenizer.decode(kept[kept != blank], skip_special_tokens=True)).strip()


def word_tokens(ids: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """Which tokens spell which word, whichever way the tokenizer marks where a word begins.

    Returns the places in `ids` of the tokens that are text; and each word with the numbers of its tokens among these.
    """
    special = set(tokenizer.all_special_ids)
    tokens = [k for k, i in enumerate(ids) if i not in special]
    words = str(tokenizer.decode([ids[k] for k in tokens])).split()
    found: list[list[int]] = [[] for _ in words]
    for n in range(len(tokens)):  # a token belongs to the word that stands last once it is there
        text = str(tokenizer.decode([ids[k] for k in tokens[: n + 1]]))
        if words:
            found[min(max(0, len(text.split()) - 1), len(words) - 1)].append(n)
    return tokens, [(word, numbers) for word, numbers in zip(words, found, strict=True) if numbers]


def timed_words(segment: Encoded, heard: Decoded, tokenizer: Any, blank: int, step: float) -> tuple[list[Word], str]:
    """The words that were heard in a segment, with their times in the recording and their confidences.

    Args:
        segment: where they were heard.
        heard: what was heard.
        tokenizer: the LLM's.
        blank: the CTC head's blank.
        step: length of a frame of the CTC head in seconds.

    Returns:
        The words; and where their times come from: "ctc" for an alignment to the CTC head, "uniform" where the tokens do not
        fit into its frames, so that each is given the same share of the segment.
    """
    tokens, groups = word_tokens(heard.ids, tokenizer)
    if not groups:
        return [], "ctc"
    aligned = align(segment.ctc, [heard.ids[k] for k in tokens], blank)
    if aligned is None:
        width = segment.seconds / len(tokens)
        spans, timing = [(k * width, (k + 1) * width) for k in range(len(tokens))], "uniform"
    else:
        spans, timing = [(a * step, (b + 1) * step) for a, b in aligned[0]], "ctc"
    words = []
    for word, found in groups:
        times = spans[found[0]][0] + segment.offset, spans[found[-1]][1] + segment.offset
        start, end = (min(max(0.0, t), segment.until) for t in times)
        confidence = float(np.exp(sum(heard.log_probs[tokens[n]] for n in found)))
        words.append(Word(word, round(start, 3), round(end, 3), round(confidence, 4)))
    return words, timing
