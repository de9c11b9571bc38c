"""`HDMoLEConfig`: every switch of the method, as a PEFT configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hdmole.method.gate import COMBINATIONS, ROUTINGS, THRESHOLDS
from hdmole.names import GENERAL


class _PeftType(str):
    """The name of the tuner.

    PEFT has an enum of names that cannot be extended; it looks tuners up by them and reads
    `.value`.
    """

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


HDMOLE = _PeftType("HDMOLE")


@dataclass
class HDMoLEConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts with hierarchical routing and dynamic thresholds.

    Every field has its meaning in `metadata["help"]`; docs/method.md has all of them in one table.
    Raises ValueError where no accent is named, or a switch has a value that it does not know.
    """

    accents: list[str] = field(
        default_factory=list, metadata={"help": "Accents of experts 1..N, the general domain not among them."}
    )
    r: int = field(default=2, metadata={"help": "Rank of each expert."})
    alpha: float | None = field(default=None, metadata={"help": "Scale of the experts' sum is alpha / r; 8 * r where not given."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the nn.Linear modules to adapt, or a regular expression, as in LoRA."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules not to adapt, as in LoRA."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full beside the experts."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt, as in LoRA."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list, as in LoRA."})
    thresholds: str = field(default="dynamic", metadata={"help": "How experts are chosen: dynamic, top_k, top_p or dense."})
    threshold_parametrisation: str = field(
        default="layer", metadata={"help": "'layer': a learned number per layer and router; 'input': tau_max * sigmoid(w.x + c)."}
    )
    threshold_max: float = field(
        default=2.0, metadata={"help": "tau_max in units of 1/N; above 1 a router can switch all experts off."}
    )
    threshold_init: float = field(default=0.5, metadata={"help": "Thresholds at the start, in units of 1/N."})
    top_k: int = field(default=2, metadata={"help": "Experts kept by top_k."})
    top_p: float = field(default=0.9, metadata={"help": "Mass kept by top_p."})
    routing: str = field(default="hierarchical", metadata={"help": "hierarchical, global or local."})
    combination: str = field(default="sum", metadata={"help": "sum, convex or product of the two gates."})
    general_class: bool = field(
        default=True, metadata={"help": "Scale gates by the accent mass m, so that general speech keeps the base model."}
    )
    shared_expert_rank: int = field(default=0, metadata={"help": "Rank of an expert that is always on (times m); 0 for none."})
    router_input: str = field(default="ax", metadata={"help": "The local router reads 'ax' (A x, cheap) or 'x'."})
    router_accent: float | None = field(
        default=None,
        metadata={
            "help": "Start of the learned c in local logits + c * log(pi); None: the local router does not see the accent."
        },
    )
    recogniser: dict[str, Any] | None = field(
        default=None, metadata={"help": "Configuration of the accent recogniser that travels with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = HDMOLE
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        if not self.accents:
            raise ValueError("HDMoLEConfig needs accents: one name an expert, the general domain not among them.")
        for name, allowed in (
            ("thresholds", THRESHOLDS),
            ("threshold_parametrisation", ("layer", "input")),
            ("routing", ROUTINGS),
            ("combination", COMBINATIONS),
            ("router_input", ("ax", "x")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"HDMoLEConfig.{name} is one of {', '.join(allowed)}; not {getattr(self, name)!r}.")
        if not 0 < self.threshold_init < self.threshold_max:
            raise ValueError("HDMoLEConfig.threshold_init must lie between 0 and threshold_max.")
        if len({GENERAL, *self.accents}) != len(self.accents) + 1:
            raise ValueError("HDMoLEConfig.accents names each accent once; the general domain has no expert.")
        if self.r < 1 or self.top_k < 1 or not 0 < self.top_p <= 1 or self.shared_expert_rank < 0:
            raise ValueError("HDMoLEConfig needs r >= 1, top_k >= 1, 0 < top_p <= 1 and shared_expert_rank >= 0.")
        if self.recogniser is not None and list(self.recogniser["labels"][1:]) != self.accents:
            raise ValueError(
                f"The accent recogniser knows {', '.join(self.recogniser['labels'])}; the experts need the general domain first, "
                f"then {', '.join(self.accents)}, in this order."
            )

    @property
    def experts(self) -> int:
        """N, the number of routed experts."""
        return len(self.accents)

    @property
    def scale(self) -> float:
        """Scale of the experts' sum: alpha / r, or 8 where no alpha is given."""
        return 8.0 if self.alpha is None else self.alpha / self.r
