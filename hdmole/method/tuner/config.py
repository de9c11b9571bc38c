"""`HDMoLEConfig`: every switch of the method, as a PEFT configuration."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig

from hdmole.method.gate import COMBINATIONS, LEARNED, ROUTINGS, THRESHOLDS
from hdmole.names import GENERAL, SHARED


class _PeftType(str):
    """The name of the tuner.

    PEFT finds tuners by an enum of names that cannot be extended. It reads their `.value`.
    """

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


HDMOLE = _PeftType("HDMOLE")


FORMAT = 2  # version of saved configurations; files of version 0.1 have none, and other defaults
PARAMETRISATIONS = ("scalar", "sigmoid", "input")
AUXILIARY = ("balance", "accent")
SHARED_WEIGHTS = ("mass", "entropy")


@dataclass
class HDMoLEConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts with hierarchical routing and dynamic thresholds.

    By default it is the method of the paper, equations (4) to (9) of arXiv 2409.19878 (see
    `hdmole.method.gate`). `HDMoLEConfig.extended` is this project's own variant.

    Raises ValueError if a switch has an unknown value, or if no accent is named.
    """

    accents: list[str] = field(
        default_factory=list, metadata={"help": "Accents of experts 1..N, the general domain not among them."}
    )
    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    alpha: float = field(default=8.0, metadata={"help": "The experts' sum is scaled by alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r), as in rank-stabilised LoRA."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by a module's name or a regular expression, as in LoRA."}
    )
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "The same for alpha."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the experts' input in training, as LoRA's lora_dropout."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the nn.Linear modules to adapt, or a regular expression, as in LoRA."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules not to adapt, as in LoRA."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full beside the experts."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt, as in LoRA."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list, as in LoRA."})
    init_weights: str = field(
        default="gaussian", metadata={"help": "How A starts: 'gaussian' (std 1 / r) or 'kaiming'. B starts at zero."}
    )
    thresholds: str = field(
        default="dynamic",
        metadata={
            "help": "How experts are chosen. 'dynamic': hard at tau, weights that sum to tau, as in the paper; 'relu': soft, in "
            "proportion to what exceeds tau; 'sparsegen': as in LD-MoLE; 'top_k'; 'top_p'; 'dense': all of them."
        },
    )
    threshold_parametrisation: str = field(
        default="scalar",
        metadata={
            "help": "'scalar': one free number per layer and router, as in the paper; 'sigmoid': tau_max * sigmoid of one; "
            "'input': tau_max * sigmoid(w.x + c), one per frame."
        },
    )
    threshold_max: float = field(
        default=2.0, metadata={"help": "tau_max in units of 1/N; above 1 a router can switch all experts off."}
    )
    threshold_init: float = field(default=1.0, metadata={"help": "Thresholds at the start, in units of 1/N."})
    top_k: int = field(default=2, metadata={"help": "Experts kept by top_k."})
    top_p: float = field(default=0.9, metadata={"help": "Mass kept by top_p."})
    routing: str = field(default="hierarchical", metadata={"help": "hierarchical, global or local."})
    combination: str = field(default="sum", metadata={"help": "sum, convex or product of the two branches."})
    general_class: bool = field(
        default=False, metadata={"help": "Scale gates by the accent mass m, so that general speech keeps the base model."}
    )
    shared_expert_rank: int = field(default=0, metadata={"help": "Rank of one more expert that every frame gets; 0 for none."})
    shared_expert_weight: str = field(
        default="mass",
        metadata={
            "help": "Weight of the shared expert: 'mass', the accent mass m (1 without a general class), or 'entropy', the "
            "entropy of the accent posterior over log N, as in EAR: the less sure the accent, the more of it."
        },
    )
    router_input: str = field(default="x", metadata={"help": "The local router reads 'x', or 'ax' (A x, cheaper)."})
    router_accent: float | None = field(
        default=None,
        metadata={
            "help": "Start of the learned c in local logits + c * log(pi); None: the local router does not see the accent."
        },
    )
    auxiliary_loss: str | None = field(
        default=None,
        metadata={
            "help": "Loss on the local router that `hdmole.auxiliary_losses` collects: 'balance' as in LoRAMoE, or 'accent', "
            "the cross-entropy with the utterance's accent, as in MoA; None for none."
        },
    )
    recogniser: dict[str, Any] | None = field(
        default=None, metadata={"help": "Configuration of the accent recogniser that travels with the adapter."}
    )
    format: int | None = field(default=None, metadata={"help": "Version of the saved configuration; set by itself."})
    use_dora: InitVar[bool] = False

    def __post_init__(self, use_dora: bool) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if use_dora:
            raise ValueError(
                "HDMoLE has no DoRA: it normalises one merged weight, and here the weights change from frame to frame. Leave use_dora "
                "out, or train a plain LoRA with it."
            )
        # it was read from a file; a new configuration has no type yet
        if self.format is None and self.peft_type is not None:
            self._read_first_format()
        self.format = self.format or FORMAT
        self.peft_type = HDMOLE
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        if not self.accents:
            raise ValueError("HDMoLEConfig needs accents: one name an expert, the general domain not among them.")
        for name, allowed in (
            ("thresholds", THRESHOLDS),
            ("threshold_parametrisation", PARAMETRISATIONS),
            ("init_weights", ("gaussian", "kaiming")),
            ("routing", ROUTINGS),
            ("combination", COMBINATIONS),
            ("router_input", ("ax", "x")),
            ("shared_expert_weight", SHARED_WEIGHTS),
            ("auxiliary_loss", (None, *AUXILIARY)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(str, allowed))
                raise ValueError(f"HDMoLEConfig.{name} is one of {known}; not {getattr(self, name)!r}.")
        if not self.threshold_init > 0 or (self.bounded and not self.threshold_init < self.threshold_max):
            raise ValueError("HDMoLEConfig.threshold_init must lie above 0, and below threshold_max where that bounds it.")
        if self.thresholds == "sparsegen" and (self.routing != "local" or self.threshold_parametrisation == "sigmoid"):
            raise ValueError(
                "HDMoLEConfig.thresholds='sparsegen' cuts the local router's logits: give routing='local', and 'scalar' or 'input' "
                "as threshold_parametrisation."
            )
        if self.auxiliary_loss and self.routing == "global":
            raise ValueError("HDMoLEConfig.auxiliary_loss is one of the local router; with routing='global' there is none.")
        if self.format != FORMAT:
            raise ValueError(f"This adapter was saved in format {self.format} by a later version; update hdmole to read it.")
        if len({GENERAL, *self.accents}) != len(self.accents) + 1:
            raise ValueError("HDMoLEConfig.accents names each accent once; the general domain has no expert.")
        if self.shared_expert_rank and SHARED in self.accents:
            raise ValueError(f"HDMoLEConfig.accents cannot name {SHARED!r} beside a shared expert, which has this name.")
        if any(rank < 1 for rank in self.rank_pattern.values()) or not 0 <= self.dropout < 1:
            raise ValueError("HDMoLEConfig needs ranks of at least 1, in rank_pattern too, and a dropout from 0 to below 1.")
        if self.r < 1 or self.top_k < 1 or not 0 < self.top_p <= 1 or self.shared_expert_rank < 0:
            raise ValueError("HDMoLEConfig needs r >= 1, top_k >= 1, 0 < top_p <= 1 and shared_expert_rank >= 0.")
        if self.recogniser is not None and list(self.recogniser["labels"][1:]) != self.accents:
            raise ValueError(
                f"The accent recogniser knows {', '.join(self.recogniser['labels'])}; the experts need the general domain first, "
                f"then {', '.join(self.accents)}, in this order."
            )

    @classmethod
    def extended(cls, accents: list[str], r: int = 2, **switches: Any) -> HDMoLEConfig:
        """This project's own variant, which was `HDMoLEConfig()` before version 0.2.

        Experts are selected softly, with bounded thresholds. The weights of each branch sum to 1.
        The accent mass scales the gate. Local routers read A x, and the scale is 8. docs/method.md
        gives the reasons. `switches` are further fields; they override these.
        """
        ours = dict(
            thresholds="relu", threshold_parametrisation="sigmoid", threshold_init=0.5, general_class=True, router_input="ax",
            alpha=8.0 * r, init_weights="kaiming",
        )  # fmt: skip
        return cls(accents=accents, r=r, **{**ours, **switches})

    def _read_first_format(self) -> None:
        """Translate the settings of a file of version 0.1 into the present ones.

        Such files hold every field but `format`, with other meanings.
        """
        self.thresholds = {"dynamic": "relu"}.get(self.thresholds, self.thresholds)
        self.threshold_parametrisation = {"layer": "sigmoid"}.get(self.threshold_parametrisation, self.threshold_parametrisation)
        self.alpha = 8.0 * self.r if self.alpha is None else self.alpha
        self.init_weights = "kaiming"

    @property
    def bounded(self) -> bool:
        """Whether thresholds are tau_max times a sigmoid. Otherwise they are free numbers."""
        return self.thresholds in ("dynamic", "relu") and self.threshold_parametrisation != "scalar"

    @property
    def learned(self) -> bool:
        """Whether experts are chosen by thresholds that are learned."""
        return self.thresholds in LEARNED

    @property
    def experts(self) -> int:
        """N, the number of routed experts."""
        return len(self.accents)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
