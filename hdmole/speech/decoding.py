"""Greedy decoding of encoder outputs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hdmole.method.routing import route


@dataclass
class Decoded:
    """What the LLM wrote for one segment."""

    text: str
    ids: list[int]
    log_probs: list[float]  # of each token, the closing one among them


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
