"""Adapt a frozen speech LLM to accents by any method of the comparison, and hear what it makes of cached speech.

* one `Speech` is shared by all methods: the same encoder outputs, posteriors, order and batches
* an `Adaptation` says what is trained; everything else (data, steps, batch, schedule) is the same for all
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.models.speech_llm import SpeechLLM, encode_all
from hdmole.names import GENERAL
from hdmole.speech.decoding import greedy
from hdmole.training.data import Batches, Corpus, States
from hdmole.training.loop import ATTENTION, fit, smoothed_objective

PLACES = {
    "projector": r"multi_modal_projector\..*(linear_1|linear_2|q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
    "encoder": r"audio_tower\.encoder\.layers\..*(linear1|linear2|q_proj|k_proj|v_proj|o_proj)",
    "llm": r"language_model\.model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}
Around = Callable[[list[int], list[int]], AbstractContextManager[None]]  # (rows, their frames) -> what a batch is decoded inside
KINDS = ("base", "full", "lora", "gated_lora", "hdmole")


@dataclass(frozen=True)
class Adaptation:
    """One way of adapting the base.

    Parameters
    ----------
    label : how it is called in tables
    kind : base, full, lora, gated_lora (LoRA times the accent mass m) or hdmole
    options : of HDMoLEConfig or LoraConfig
    rate : the method whose tuned learning rate it takes
    replay : share of the training utterances that are general speech, in place of accented ones
    share : share of the training utterances it may learn from, in as many steps
    place : projector, encoder or llm
    true_accent : route by the true accent in place of what the recogniser heard, an upper bound
    warm_share : share of the steps in which each expert learns its own accent alone, as one LoRA per accent
    """

    label: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: str = ""
    replay: float = 0.0
    share: float = 1.0
    place: str = "projector"
    true_accent: bool = False
    warm_share: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"The kind of a method is one of {', '.join(KINDS)}; not {self.kind!r}.")
        if self.place not in PLACES:
            raise ValueError(f"The place of a method is one of {', '.join(PLACES)}; not {self.place!r}.")
        if not 0 <= self.replay < 1 or not 0 <= self.warm_share < 1:
            raise ValueError("replay and warm_share are shares: at least 0, below 1.")
        if not 0 < self.share <= 1:
            raise ValueError("share is more than 0 and at most 1.")

    @property
    def routed(self) -> bool:
        """Whether its layers read the accent posterior."""
        return self.kind in ("gated_lora", "hdmole")


@dataclass(frozen=True)
class Speech:
    """Utterances with their encoder outputs and accent posteriors, computed once for all methods.

    `posteriors` is (utterances, N + 1), by `recogniser`; both are missing where nothing is routed yet.
    """

    corpus: Corpus
    states: States
    tokenizer: Any
    base: Path
    recogniser: AccentRecogniser | None = None
    posteriors: np.ndarray | None = None

    @classmethod
    def load(cls, folder: Path, base: Path, tokenizer: Path) -> Speech:
        """What `hdmole.training.preparation` left in a folder (corpus, states, recogniser), with a model and its tokenizer."""
        return cls(
            Corpus(folder / "corpus"), States.load(folder / "states"), AutoTokenizer.from_pretrained(tokenizer), base,
            AccentRecogniser.load(folder / "recogniser"), np.load(folder / "recogniser" / "posteriors.npy"),
        )  # fmt: skip

    def posterior(self, rows: Sequence[int], adaptation: Adaptation) -> Tensor:
        """(U, N + 1) for HDMoLE, (U, 2) for gated LoRA: general or accented."""
        assert self.recogniser is not None and self.posteriors is not None
        if adaptation.true_accent:
            labels = self.recogniser.labels
            known = [labels.index(a) if a in labels else 0 for a in self.corpus.index.accent.iloc[list(rows)]]
            pi = torch.eye(len(labels))[known]
        else:
            pi = torch.from_numpy(self.posteriors[list(rows)]).float()
        return torch.stack([pi[:, 0], 1 - pi[:, 0]], 1) if adaptation.kind == "gated_lora" else pi

    def batches(
        self, rows: list[int], seed: int, extra: Callable[[list[int]], dict[str, Tensor]], mels: bool = False, size: int = 1
    ) -> Batches:
        """Training batches of at most `size` times 80 s and 24 utterances, each epoch with another SpecAugment view of each."""
        index = self.corpus.index
        texts = self.tokenizer(list(index.text.iloc[rows]), add_special_tokens=False)["input_ids"]
        ids = {i: [*text, self.tokenizer.eos_token_id] for i, text in zip(rows, texts, strict=True)}

        def fetch(i: int) -> dict[str, np.ndarray]:
            if mels:
                return {"input_features": self.corpus.features(i)}
            view = int(np.random.default_rng((seed, batches.epoch, i)).integers(0, 2))
            return {"encoder_states": self.states.get(i, view)}

        batches = Batches(
            rows,
            fetch,
            index.frames.to_numpy() if mels else self.states.spans[0, :, 1],
            size * (8_000 if mels else 1_000),
            lambda rows: {"labels": pad([ids[i] for i in rows]), **extra(rows)},
            seed=seed,
            max_rows=size * 24,
        )
        return batches


def pad(ids: list[list[int]]) -> Tensor:
    """Token ids (B, L), padded with -100."""
    return nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=-100)


def load_base(folder: Path, device: str | torch.device = "cpu") -> SpeechLLM:
    """The frozen base in float32."""
    model: Any = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
    base: SpeechLLM = model.to(device).eval().requires_grad_(False)
    return base


def with_adapter(base: SpeechLLM, adaptation: Adaptation, recogniser: AccentRecogniser | None) -> Any:
    """The base with what `adaptation` trains; exactly that requires a gradient."""
    options = dict(adaptation.options)
    if adaptation.kind in ("base", "full"):
        for module in _targets(base, adaptation.place) if adaptation.kind == "full" else ():
            module.requires_grad_(True)
        return base
    shared: dict[str, Any] = {"target_modules": PLACES[adaptation.place]}
    if adaptation.kind == "lora":
        rank = options.pop("r")
        config: Any = LoraConfig(r=rank, lora_alpha=2 * rank, **shared, **options)
    elif adaptation.kind == "gated_lora":  # one expert for all accents, always on, times m: LoRA gated by the accent mass
        rank = options.pop("r")
        config = HDMoLEConfig.extended(
            ["accented"], r=rank, alpha=2 * rank, routing="global", thresholds="dense", **shared, **options
        )
    else:
        assert recogniser is not None
        config = HDMoLEConfig.extended(recogniser.labels[1:], recogniser=recogniser.arguments, **shared, **options)
    model: Any = get_peft_model(base, config)
    if adaptation.kind == "hdmole":
        model.base_model.set_recogniser(recogniser)
    return model


def _targets(base: SpeechLLM, place: str) -> list[nn.Module]:
    """What full fine-tuning trains: the whole projector, or the linear layers of another place."""
    if place == "projector":
        return [base.multi_modal_projector]
    return [*_linears(base, place)]


def _linears(base: SpeechLLM, place: str) -> list[nn.Linear]:
    return [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(PLACES[place], n)]


def trainable(model: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def equal_rank(base: SpeechLLM, parameters: int, place: str) -> int:
    """The rank at which LoRA in a place trains nearest to so many `parameters`."""
    linears = _linears(base, place)
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linears)))


def training_rows(corpus: Corpus, adaptation: Adaptation, seed: int) -> list[int]:
    """The utterances an adaptation learns from: accented training speech, a share of it, with general speech by `replay`.

    Replayed utterances take the place of as many accented ones, so that the number stays the same.
    """
    rows, rng = corpus.select("train", "accent"), np.random.default_rng(seed)
    if adaptation.share < 1:
        rows = rng.permutation(rows)[: max(1, round(adaptation.share * len(rows)))].tolist()
    if adaptation.replay:
        general = corpus.select("train", GENERAL)
        count = min(len(general), round(adaptation.replay * len(rows)))
        rows = [*rng.permutation(rows)[count:].tolist(), *rng.permutation(general)[:count].tolist()]
    return rows


def parameter_groups(named: Sequence[tuple[str, nn.Parameter]], rate: float) -> list[dict[str, Any]]:
    """AdamW parameter groups: thresholds learn at ten times the rate and without weight decay, all others at the rate."""
    slow, fast = ([p for name, p in named if ("threshold" in name) == wanted] for wanted in (False, True))
    groups: list[dict[str, Any]] = [{"params": slow}]
    return [*groups, {"params": fast, "lr": 10 * rate, "weight_decay": 0.0}] if fast else groups


def adapt(
    speech: Speech,
    adaptation: Adaptation,
    folder: Path,
    *,
    epochs: float,
    rate: float,
    seed: int,
    report: Callable[[str], None],
    callbacks: Sequence[TrainerCallback] = (),
    device: str = "cpu",
) -> Any:
    """The adapted model: loaded from `folder`, or trained and saved there; what was cut off resumes from `folder`-training.

    Every method gets as many steps, on the training utterances of the accents in one order (`adaptation.replay` of them
    exchanged for general ones). Loss: cross-entropy of the transcript with label smoothing 0.05.
    """
    torch.manual_seed(seed)
    base = load_base(speech.base, device)
    if adaptation.kind not in ("base", "full") and folder.is_dir():
        return PeftModel.from_pretrained(base, folder).eval()
    model = with_adapter(base, adaptation, speech.recogniser)
    if adaptation.kind == "base":
        return model
    if folder.is_dir():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return model.eval()
    attention = base.language_model.config._attn_implementation
    base.language_model.set_attn_implementation(ATTENTION)
    report(f"{folder.name}: {trainable(model):,} trainable parameters")
    rows = training_rows(speech.corpus, adaptation, seed)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def run(part: Adaptation, name: str, share: float) -> None:
        batches = speech.batches(
            rows, seed, (lambda r: {"accent_posterior": speech.posterior(r, part)}) if part.routed else (lambda r: {}),
            mels=part.place == "encoder",
        )  # fmt: skip
        fit(
            model, batches, smoothed_objective, folder.with_name(f"{folder.name}-{name}"), epochs=share * epochs / adaptation.share, rate=rate,
            report=report, groups=parameter_groups(named, rate), seed=seed, callbacks=callbacks,
        )  # fmt: skip

    if adaptation.warm_share:
        with _each_expert_alone(model):
            run(replace(adaptation, true_accent=True), "warming", adaptation.warm_share)
    run(adaptation, "training", 1 - adaptation.warm_share)
    base.language_model.set_attn_implementation(attention)
    part = folder.with_name(f"{folder.name}.part")  # what is there is whole
    shutil.rmtree(part, ignore_errors=True)
    if adaptation.kind == "full":
        part.mkdir(parents=True)
        save_file({n: p.detach().contiguous() for n, p in named}, part / "model.safetensors")
    else:
        model.save_pretrained(part)
    part.rename(folder)
    return model.eval()


@contextmanager
def _each_expert_alone(model: nn.Module) -> Iterator[None]:
    """Inside, the gate of an utterance is its accent posterior: with the true accent, one LoRA per accent is trained."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, HDMoLELinear)]
    kept = [layer.configs for layer in layers]
    for layer in layers:
        layer.configs = {
            n: replace(c, routing="global", thresholds="dense", shared_expert_rank=0) for n, c in layer.configs.items()
        }
    try:
        yield
    finally:
        for layer, configs in zip(layers, kept, strict=True):
            layer.configs = configs


@torch.no_grad()
def hear(
    speech: Speech,
    model: Any,
    adaptation: Adaptation,
    rows: Sequence[int],
    around: Around | None = None,
) -> list[str]:
    """Greedy transcripts of utterances, in the order of `rows`.

    `around(rows, lengths)` gives a context manager for the decoding of each batch: a trace, an intervention; where the LLM
    is adapted, a batch is then one utterance, whose tokens no padding is among.
    """
    size = 1 if around and adaptation.place == "llm" else 48
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda i: int(speech.states.spans[0, i, 1]))
    texts: dict[int, str] = {}
    for k in range(0, len(ordered), size):
        part = ordered[k : k + size]
        posterior = speech.posterior(part, adaptation).to(device) if adaptation.routed else None
        lengths = speech.states.spans[0, part, 1].tolist()
        with around(part, lengths) if around else nullcontext():
            heard = greedy(model, encoder_states(speech, model, adaptation, part), speech.tokenizer, posterior)
        texts.update({i: d.text for i, d in zip(part, heard, strict=True)})
    return [texts[i] for i in rows]


@torch.no_grad()
def encoder_states(speech: Speech, model: Any, adaptation: Adaptation, rows: Sequence[int]) -> list[Tensor]:
    """What the encoder says of utterances: the cached outputs, or the adapted encoder's own."""
    device = next(model.parameters()).device
    if adaptation.place != "encoder":
        return [torch.from_numpy(speech.states.get(i).astype(np.float32)).to(device) for i in rows]
    mels = [torch.from_numpy(np.array(speech.corpus.features(i), np.float32)).to(device) for i in rows]
    return encode_all(model, mels, speech.posterior(rows, adaptation).to(device) if adaptation.routed else None)
