"""Adapt a frozen speech LLM to accents by any method of the comparison, and transcribe with it.

* All methods use one `Speech`: the same encoder outputs, accent posteriors, order of utterances
  and batches.
* An `Adaptation` says what is trained. Data, number of steps, batch size and schedule are the same
  for all methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hdmole.errors import UserError
from hdmole.files import written
from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.routing import auxiliary_losses
from hdmole.method.tuner import HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.models.family import family
from hdmole.models.speech_llm import encode_all
from hdmole.names import GENERAL
from hdmole.speech.decoding import greedy
from hdmole.speech.loading import load_adapter, load_tokenizer, read_config, weights_folder
from hdmole.training.data import Batches, Corpus, States
from hdmole.training.loop import ATTENTION, fit, smoothed_objective

PLACES = ("projector", "encoder", "llm")
# A function that takes the rows of a batch and their lengths in frames. It returns the context
# manager in which the batch is decoded.
Around = Callable[[list[int], list[int]], AbstractContextManager[None]]
KINDS = ("base", "full", "lora", "gated_lora", "hdmole", "extended")
MIXTURES = ("hdmole", "extended")  # kinds with one expert for each accent
TRAINED_WITH = ("recogniser", "accent")
AUXILIARY_WEIGHT = 0.01  # of the auxiliary loss of each layer, as in docs/method.md


class AdaptationError(UserError):
    """A description of a method that cannot be used. The codes begin with `adaptation.`."""


@dataclass(frozen=True)
class Adaptation:
    """One way of adapting the base.

    Args:
        label: the method's name in tables.
        kind: base (nothing is trained), full (fine-tuning), lora, gated_lora (LoRA whose output is
            multiplied by the probability that the speech is accented), hdmole (the paper's method
            and other routers) or extended (this project's variant).
        options: arguments of `LoraConfig`, `HDMoLEConfig` or `HDMoLEConfig.extended`. For hdmole,
            alpha is r if it is not given, as in the paper.
        rate: name of the method whose tuned learning rate is used. If empty, this method has
            its own.
        replay: share of the accented training utterances that are replaced by general speech, at
            least 0 and below 1.
        share: share of the training utterances that are used, above 0 and at most 1. The number of
            steps stays the same.
        place: the part of the model that is adapted: projector, encoder or llm.
        true_accent: route by the true accent in place of the recogniser's posterior. This gives an
            upper bound.
        train_with: "accent" routes by the true accent in training only, and by the recogniser's
            posterior afterwards, as in EAR (arXiv 2606.10454). "recogniser" always routes by the
            posterior.
        recogniser: name of the recogniser whose posteriors route, one of `Speech.others`. If empty,
            it is the released one.
        warm_share: share of the steps in which each expert is trained on its own accent only, at
            least 0 and below 1. These steps come first.
        threshold_rate: learning rate of the thresholds, as a factor of the experts' rate.
        router_rate: learning rate of what reads the layer's input: local routers, and thresholds of
            the input. A factor of the experts' rate, too.
        muon: train linear layers and experts with Muon in place of AdamW (see `MuonAdamW`).

    Raises:
        AdaptationError: kind, place or train_with is unknown, a share is out of its range, or a
            rate is not above 0.
    """

    label: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: str = ""
    replay: float = 0.0
    share: float = 1.0
    place: str = "projector"
    true_accent: bool = False
    train_with: str = "recogniser"
    recogniser: str = ""
    warm_share: float = 0.0
    threshold_rate: float = 1.0
    router_rate: float = 1.0
    muon: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            sentence = "The kind of a method is one of {kinds}; not {kind}."
            raise AdaptationError("adaptation.no_such_kind", sentence, kinds=", ".join(KINDS), kind=repr(self.kind))
        if self.place not in PLACES:
            sentence = "The place of a method is one of {places}; not {place}."
            raise AdaptationError("adaptation.no_such_place", sentence, places=", ".join(PLACES), place=repr(self.place))
        if not 0 <= self.replay < 1 or not 0 <= self.warm_share < 1:
            raise AdaptationError("adaptation.no_share", "replay and warm_share are shares: at least 0, below 1.")
        if not 0 < self.share <= 1:
            raise AdaptationError("adaptation.no_speech", "share is more than 0 and at most 1.")
        if self.train_with not in TRAINED_WITH:
            sentence = "train_with is one of {known}; not {given}."
            raise AdaptationError("adaptation.trained_with", sentence, known=", ".join(TRAINED_WITH), given=repr(self.train_with))
        if not self.threshold_rate > 0 or not self.router_rate > 0:
            raise AdaptationError("adaptation.no_factor", "threshold_rate and router_rate are factors above 0.")

    @property
    def routed(self) -> bool:
        """Whether the adapted layers read the accent posterior."""
        return self.kind == "gated_lora" or self.kind in MIXTURES


@dataclass(frozen=True)
class Speech:
    """Utterances with their encoder outputs and accent posteriors, computed once for all methods.

    Args:
        corpus: mel features and texts.
        states: encoder outputs.
        tokenizer: the tokenizer of the LLM.
        base: folder of the frozen model.
        recogniser: the accent recogniser of N accents. Methods without routing do not need it.
        posteriors: accent posterior of each utterance by `recogniser`, (utterances, N + 1).
        others: other recognisers and their posteriors, by their names.
    """

    corpus: Corpus
    states: States
    tokenizer: Any
    base: Path
    recogniser: AccentRecogniser | None = None
    posteriors: np.ndarray | None = None
    others: Mapping[str, tuple[AccentRecogniser, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, base: Path, tokenizer: Path) -> Speech:
        """Load speech that `hdmole.training.preparation` wrote.

        Args:
            folder: folder with the subfolders corpus, states and recogniser. Posteriors by another
                recogniser are in the subfolder recogniser-NAME.
            base: folder of the frozen model.
            tokenizer: folder of the LLM's tokenizer.
        """
        return cls(
            corpus=Corpus(folder / "corpus"),
            states=States.load(folder / "states"),
            tokenizer=load_tokenizer(tokenizer),
            base=base,
            recogniser=AccentRecogniser.load(folder / "recogniser"),
            posteriors=np.load(folder / "recogniser" / "posteriors.npy"),
            others={
                file.parent.name.removeprefix("recogniser-"): (AccentRecogniser.load(file.parent), np.load(file))
                for file in folder.glob("recogniser-*/posteriors.npy")
            },
        )

    def posterior(self, rows: Sequence[int], adaptation: Adaptation) -> Tensor:
        """Accent posterior of the utterances in `rows`.

        Returns:
            (U, N + 1), the general class first. For gated LoRA (U, 2): the probabilities of general
            and of accented speech.

        Raises:
            AdaptationError: there are no posteriors by the recogniser that the method names.
        """
        assert self.recogniser is not None and self.posteriors is not None
        if adaptation.true_accent:
            labels = self.recogniser.labels
            known = [labels.index(a) if a in labels else 0 for a in self.corpus.index.accent.iloc[list(rows)]]
            pi = torch.eye(len(labels))[known]
        else:
            pi = torch.from_numpy(self.recognised(adaptation.recogniser)[1][list(rows)]).float()
        return torch.stack([pi[:, 0], 1 - pi[:, 0]], 1) if adaptation.kind == "gated_lora" else pi

    def recognised(self, name: str) -> tuple[AccentRecogniser, np.ndarray]:
        """A recogniser of `others`, or the released one for "", and its posteriors (U, N + 1)."""
        if name and name not in self.others:
            sentence = "The speech has no accent posteriors by the recogniser {name}; 'hdmole demo recognisers' makes them."
            raise AdaptationError("adaptation.no_recogniser", sentence, name=repr(name))
        assert self.recogniser is not None and self.posteriors is not None
        return self.others[name] if name else (self.recogniser, self.posteriors)

    def batches(
        self, rows: list[int], seed: int, extra: Callable[[list[int]], dict[str, Tensor]], mels: bool = False, size: int = 1
    ) -> Batches:
        """Make training batches.

        In each epoch, one of the two stored SpecAugment views of every utterance is drawn at
        random.

        Args:
            rows: the utterances.
            seed: random seed that decides the batches and the views.
            extra: gives further tensors for the rows of a batch, such as accent posteriors.
            mels: whether the batches hold mel features for the encoder in place of encoder outputs.
            size: a batch holds at most `size` times 80 s and `size` times 24 utterances.
        """
        index = self.corpus.index

        def labels(rows: list[int]) -> Tensor:
            texts = self.tokenizer(list(index.text.iloc[rows]), add_special_tokens=False)["input_ids"]
            return pad([[*text, self.tokenizer.eos_token_id] for text in texts])

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
            lambda rows: {"labels": labels(rows), **extra(rows)},
            seed=seed,
            max_rows=size * 24,
        )
        return batches


def pad(ids: list[list[int]]) -> Tensor:
    """Token ids of B texts as a tensor (B, L), padded with -100."""
    return nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=-100)


def load_base(folder: Path, device: str | torch.device = "cpu") -> Any:
    """Load the base of any family in float32, without gradients.

    Raises ModelError if its family is not known.
    """
    kind = family(read_config(folder)["model_type"])
    model = kind.from_pretrained(weights_folder(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    return model.to(device).eval().requires_grad_(False)


def with_adapter(base: Any, adaptation: Adaptation, recogniser: AccentRecogniser | None) -> Any:
    """Add to the base what `adaptation` trains. Only those parameters require a gradient.

    Returns:
        A PEFT model, or `base` itself for the kinds base and full.
    """
    options = dict(adaptation.options)
    if adaptation.kind in ("base", "full"):
        for module in _targets(base, adaptation.place) if adaptation.kind == "full" else ():
            module.requires_grad_(True)
        return base
    shared: dict[str, Any] = {"target_modules": _names(base, adaptation.place)}
    if adaptation.kind == "lora":
        rank = options.pop("r")
        config: Any = LoraConfig(r=rank, lora_alpha=2 * rank, **shared, **options)
    elif adaptation.kind == "gated_lora":
        # One expert for all accents. It is always active, and its output is multiplied by the
        # probability that the speech is accented.
        rank = options.pop("r")
        config = HDMoLEConfig.extended(
            ["accented"], r=rank, alpha=2 * rank, routing="global", thresholds="dense", **shared, **options
        )
    else:
        assert recogniser is not None
        config = mixture_config(adaptation, recogniser.labels[1:], recogniser=recogniser.arguments, **shared)
    model: Any = get_peft_model(base, config)
    if adaptation.kind in MIXTURES:
        model.base_model.set_recogniser(recogniser)
    return model


def mixture_config(adaptation: Adaptation, accents: list[str], **more: Any) -> HDMoLEConfig:
    """The `HDMoLEConfig` of a method with one expert for each accent. `more` are further fields."""
    options = dict(adaptation.options)
    if adaptation.kind == "extended":
        return HDMoLEConfig.extended(accents, **options, **more)
    return HDMoLEConfig(accents=accents, **{"alpha": options.get("r", HDMoLEConfig.r), **options}, **more)


def _names(base: Any, place: str) -> str:
    """A regular expression of the linear layers in a part of the model.

    Raises AdaptationError if the model has no such part.
    """
    if place not in base.places:
        sentence = "This model has no {place}; give place, one of {places}."
        raise AdaptationError("adaptation.place_not_here", sentence, place=place, places=", ".join(base.places))
    names: str = base.places[place]
    return names


def _targets(base: Any, place: str) -> list[nn.Module]:
    """The modules that full fine-tuning trains.

    These are the whole projector, or the linear layers of encoder or LLM.
    """
    if place == "projector" and base.projector:
        return [base.get_submodule(base.projector)]
    return [*_linears(base, place)]


def _linears(base: Any, place: str) -> list[nn.Linear]:
    return [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(_names(base, place), n)]


def trainable(model: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def equal_rank(base: Any, parameters: int, place: str) -> int:
    """The rank (at least 1) at which LoRA in `place` trains about `parameters` parameters."""
    linears = _linears(base, place)
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linears)))


def training_rows(corpus: Corpus, adaptation: Adaptation, seed: int) -> list[int]:
    """The training utterances of a method.

    The share `adaptation.share` of the accented utterances is kept. Of these, the share
    `adaptation.replay` is replaced by as many general utterances.
    """
    rows, rng = corpus.select("train", "accent"), np.random.default_rng(seed)
    if adaptation.share < 1:
        rows = rng.permutation(rows)[: max(1, round(adaptation.share * len(rows)))].tolist()
    if adaptation.replay:
        general = corpus.select("train", GENERAL)
        count = min(len(general), round(adaptation.replay * len(rows)))
        rows = [*rng.permutation(rows)[count:].tolist(), *rng.permutation(general)[:count].tolist()]
    return rows


def parameter_groups(named: Sequence[tuple[str, nn.Parameter]], rate: float, adaptation: Adaptation) -> list[dict[str, Any]]:
    """Parameter groups for AdamW.

    Thresholds and local routers get the factors `threshold_rate` and `router_rate` of the learning
    rate, thresholds without weight decay. All other parameters get `rate`.
    """
    groups: dict[str, list[nn.Parameter]] = {"experts": [], "thresholds": [], "routers": []}
    for name, parameter in named:
        reads_input = "hdmole_router" in name or "hdmole_threshold_weight" in name
        part = "routers" if reads_input else "thresholds" if "hdmole_threshold" in name else "experts"
        groups[part].append(parameter)
    found: list[dict[str, Any]] = [
        {"params": groups["experts"]},
        {"params": groups["thresholds"], "lr": adaptation.threshold_rate * rate, "weight_decay": 0.0},
        {"params": groups["routers"], "lr": adaptation.router_rate * rate},
    ]
    return [group for group in found if group["params"]]


def _with_auxiliary_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`smoothed_objective`, and the layers' auxiliary losses times `AUXILIARY_WEIGHT`."""
    with auxiliary_losses() as losses:
        loss = smoothed_objective(model, batch)
    return loss + AUXILIARY_WEIGHT * torch.stack(losses).sum()


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
    accumulation: int = 1,
) -> Any:
    """Load the adapted model from `folder`, or train it and save it there.

    Every method gets the same number of steps, and utterances in the same order. The loss is the
    cross-entropy of the transcript with label smoothing 0.05, plus the auxiliary loss of a method
    that has one.

    Args:
        speech: training speech. Its `base` is adapted.
        adaptation: what is trained.
        folder: folder of the adapter. Checkpoints are written to the folder of the same name with
            "-training" at its end. An interrupted training goes on from the last checkpoint.
        epochs: passes over the training utterances; may be a fraction. If only a share of them is
            used, there are as many more passes.
        rate: peak learning rate.
        seed: random seed of the initialisation, the order of utterances and the views.
        report: called with each line about the progress, such as the loss.
        callbacks: callbacks of transformers' Trainer.
        device: where the model is trained.
        accumulation: as in `fit`.

    Returns:
        The adapted model, ready for decoding.
    """
    torch.manual_seed(seed)
    base = load_base(speech.base, device)
    if adaptation.kind not in ("base", "full") and folder.is_dir():
        return load_adapter(base, folder)
    model = with_adapter(base, adaptation, speech.recognised(adaptation.recogniser)[0] if adaptation.routed else None)
    if adaptation.kind == "base":
        return model
    if folder.is_dir():
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        return model.eval()
    llm = getattr(base, "language_model", None)  # other families keep the attention that they were loaded with
    attention = llm.config._attn_implementation if llm else ""
    if llm:
        llm.set_attn_implementation(ATTENTION)
    report(f"{folder.name}: {trainable(model):,} trainable parameters")
    rows = training_rows(speech.corpus, adaptation, seed)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    objective = _with_auxiliary_losses if adaptation.options.get("auxiliary_loss") else smoothed_objective

    def run(part: Adaptation, name: str, share: float) -> None:
        batches = speech.batches(
            rows, seed, (lambda r: {"accent_posterior": speech.posterior(r, part)}) if part.routed else (lambda r: {}),
            mels=part.place == "encoder",
        )  # fmt: skip
        fit(
            model,
            batches,
            objective,
            folder.with_name(f"{folder.name}-{name}"),
            epochs=share * epochs / adaptation.share,
            rate=rate,
            report=report,
            groups=parameter_groups(named, rate, adaptation),
            muon=adaptation.muon,
            seed=seed,
            callbacks=callbacks,
            accumulation=accumulation,
        )

    if adaptation.warm_share:
        with _each_expert_alone(model):
            run(replace(adaptation, true_accent=True), "warming", adaptation.warm_share)
    by_accent = adaptation.true_accent or adaptation.train_with == "accent"
    run(replace(adaptation, true_accent=by_accent), "training", 1 - adaptation.warm_share)
    if llm:
        llm.set_attn_implementation(attention)
    processes = PartialState()
    if processes.is_main_process:
        with written(folder) as part:
            if adaptation.kind == "full":
                part.mkdir()
                save_file({n: p.detach().contiguous() for n, p in named}, part / "model.safetensors")
            else:
                model.save_pretrained(part)
    processes.wait_for_everyone()
    return model.eval()


@contextmanager
def _each_expert_alone(model: nn.Module) -> Iterator[None]:
    """Inside the block, only the global router works, and without a shared expert.

    With the true accent as posterior, each expert is then trained as a LoRA of one accent. Its
    weight is the layer's threshold where experts are chosen as in the paper, and 1 otherwise.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, HDMoLELinear)]
    kept = [layer.configs for layer in layers]
    for layer in layers:
        layer.configs = {
            n: replace(
                c,
                routing="global",
                thresholds="dynamic" if c.thresholds == "dynamic" else "dense",
                shared_expert_rank=0,
                auxiliary_loss=None,
            )
            for n, c in layer.configs.items()
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
    """Transcribe utterances by greedy decoding.

    Args:
        speech: the utterances with their encoder outputs and posteriors.
        model: the adapted model.
        adaptation: how it was adapted.
        rows: the utterances.
        around: gives the context manager in which each batch is decoded, such as a trace or an
            intervention. If the LLM is adapted, each batch then has one utterance only, because
            padding would otherwise appear in the trace.

    Returns:
        The transcripts, in the order of `rows`.
    """
    device = next(model.parameters()).device
    size = 1 if around and adaptation.place == "llm" else 256 if device.type == "cuda" else 48
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
    """Encoder outputs (T, d) of each utterance.

    The stored ones are returned, unless the encoder is adapted. Then the utterances are encoded
    anew.
    """
    device = next(model.parameters()).device
    if adaptation.place != "encoder":
        return [torch.from_numpy(speech.states.get(i).astype(np.float32)).to(device) for i in rows]
    mels = [torch.from_numpy(np.array(speech.corpus.features(i), np.float32)).to(device) for i in rows]
    return encode_all(model, mels, speech.posterior(rows, adaptation).to(device) if adaptation.routed else None)
