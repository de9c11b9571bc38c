"""The results of the paper: Tables I to III of arXiv 2409.19878 (ICASSP 2025), as numbers.

Error rates are character error rates (CER) in percent. The target is KeSpeech, which is standard
Mandarin and eight accents. General speech is AISHELL-2, which no method was adapted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hdmole.texts import Text

SOURCE = "arXiv 2409.19878"
Table = Literal["I", "II", "III"]


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables, or of ours beside them, and its method here.

    Args:
        table: number of the table.
        label: what the paper calls the row.
        method: the name of our method in `hdmole.study.config.known_methods`; None where we have
            none.
        trained: trained parameters in millions.
        target: CER on KeSpeech in %.
        general: CER on AISHELL-2 in %.

    Where the paper gives no number, it is None. A row without any is of a method that the paper
    does not have.
    """

    table: Table
    label: Text
    method: str | None
    trained: float | None = None
    target: float | None = None
    general: float | None = None


ROWS = (
    Row("I", Text("Base"), "base", None, 25.65, 3.50),
    Row("I", Text("Full fine-tuning"), "full", 51.0, 15.64, 4.91),
    Row("I", Text("LoRA, one expert's rank"), "lora_r", 0.31, 19.98, 4.05),
    Row("I", Text("MOELoRA"), None, 4.92, 19.95, 4.66),
    Row("I", Text("LoRAMoE"), "loramoe", 1.99, 18.76, 4.33),
    Row("I", Text("MoRAL"), "moral", 1.99, 19.28, 4.35),
    Row("I", Text("MoA"), "moa", 4.92, 18.80, 4.47),
    Row("I", Text("HDMoLE"), "hdmole", 4.92, 16.58, 3.69),
    Row("I", Text("HDMoLE, no thresholds"), "no_thresholds", 4.92, 17.39, 3.82),
    Row("I", Text("HDMoLE, no local routing"), "no_local", 4.37, 18.33, 3.86),
    Row("I", Text("HDMoLE, no global routing"), "no_global", 4.92, 18.76, 3.94),
    Row("I", Text("LoRA, equal parameters"), "lora"),
    Row("I", Text("LoRA times accent mass"), "gated_lora"),
    Row("I", Text("MoLE"), "mole"),
    Row("I", Text("AdaMoLE"), "adamole"),
    Row("I", Text("LD-MoLE"), "ldmole"),
    Row("I", Text("EAR"), "ear"),
    Row("I", Text("Our variant of HDMoLE"), "extended"),
    Row("II", Text("Recogniser not converged"), "recogniser_early", None, 18.11),
    Row("II", Text("Recogniser as trained"), "hdmole", None, 16.58),
    Row("II", Text("Better recogniser"), "recogniser_better"),
    Row("II", Text("True accent"), "true_accent", None, 15.35),
    Row("III", Text("Rank 2"), "rank2"),
    Row("III", Text("Rank 4"), "rank4", 2.73, 16.94),
    Row("III", Text("Rank 8"), "rank8", 4.92, 16.58),
    Row("III", Text("Rank 16"), "rank16", 9.29, 16.07),
    Row("III", Text("Rank 32"), "rank32", 18.05, 15.92),
    Row("III", Text("Rank 64"), None, 35.55, 15.98),
)


def row(method: str) -> Row | None:
    """The first row that a method of ours answers for; None if there is none."""
    return next((found for found in ROWS if found.method == method), None)
