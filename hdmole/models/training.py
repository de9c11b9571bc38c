"""What all families do alike in training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def text_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy () of labels (B, L), padded with -100, by logits (B, L, vocabulary).

    It is the mean over the labels. With `count`, the number of labels in all batches of a training
    step (transformers' `num_items_in_batch`), it is the sum divided by that number. Steps that
    accumulate gradients then have the loss of one large batch.
    """
    reduction = "mean" if count is None else "sum"
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction=reduction)
    return loss if count is None else loss / count


def keep_norms(module: nn.Module) -> None:
    """Frozen batch norms keep the statistics that they were trained with, in training too."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d) and not part.weight.requires_grad:
            part.eval()
