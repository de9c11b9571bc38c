"""Which prompt of a batch each window of audio and each audio token belongs to.

Speech LLMs of transformers get prompts (U, L) with audio tokens in them, and features of windows
(W, ...). A prompt has as many audio tokens as its windows give, in the order of the windows. So the
prompt of a window follows from the tokens, and never from W and U alone: two prompts of which one
has two windows and one has none also have as many windows as prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owners(tokens: Tensor, windows: int, lengths: Tensor | None = None) -> Tensor | None:
    """The prompt (W,) of each window; None where the number of tokens does not tell it.

    Args:
        tokens: (U,) audio tokens in each prompt.
        windows: W, the number of windows of all prompts.
        lengths: (W,) valid frames of each window; None if all windows are equally long.
    """
    prompts = torch.arange(len(tokens), device=tokens.device)
    if int(tokens.sum()) == windows:  # one token stands for a window
        return prompts.repeat_interleave(tokens)
    spoken = prompts[tokens > 0]
    if windows == len(spoken):  # each of them has one window at least
        return spoken
    if len(spoken) == 1:
        return spoken.expand(windows)
    same = lengths is None or bool((lengths == lengths[:1]).all())
    each, rest = divmod(int(tokens.sum()), max(1, windows))
    if same and not rest and each and not bool((tokens % each).any()):
        return prompts.repeat_interleave(tokens // each)
    return None


def pooled(posterior: Tensor, owner: Tensor, weight: Tensor, prompts: int) -> Tensor:
    """The posterior (U, N + 1) of each prompt: the mean of those of its windows (W, N + 1).

    `weight` (W,) are the frames of each window. A prompt without audio is of the general domain.
    """
    weight = weight.to(posterior)
    sums = posterior.new_zeros(prompts, posterior.shape[1]).index_add(0, owner, posterior * weight[:, None])
    total = posterior.new_zeros(prompts).index_add(0, owner, weight)[:, None]
    general = torch.eye(posterior.shape[1], dtype=posterior.dtype, device=posterior.device)[0]
    return torch.where(total > 0, sums / total.clamp_min(1e-9), general)
