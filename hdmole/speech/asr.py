"""`ASR`: the one object that transcribes. The command line, the app and the evaluation all use it.

* an utterance is encoded once (`encode`): mel features, encoder states, CTC posteriors, accent posterior; every method
  (frozen base, LoRA, full fine-tuning, HDMoLE) then decodes from that
* each method has its own projector and shares the rest, unless its adapter changes that too, so that methods and threads never
  interfere; one that changes the encoder encodes the utterance for itself when it decodes
* word times come from the CTC head, word confidence from the LLM
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer

import hdmole.method.tuner  # noqa: F401  (makes PEFT know HDMoLE)
from hdmole.errors import UserError
from hdmole.method.intervention import intervene
from hdmole.method.routing import route
from hdmole.method.tracing import Trace, trace
from hdmole.models.speech_llm import SpeechLLM, encode_all
from hdmole.names import GENERAL, METHOD_NAMES
from hdmole.speech.alignment import align
from hdmole.speech.audio import SAMPLE_RATE, Audio
from hdmole.speech.decoding import Decoded, greedy
from hdmole.speech.domain import DomainScorer, domain_features, flags, verdict_of_all
from hdmole.speech.segments import cut, framed

AGREED = 0.4  # letters in which CTC head and LLM differ, as a share: of utterances heard whole less, of several at once more


class ModelError(UserError):
    """A model that cannot be used, or a method or an accent that it does not have. The codes begin with `model.`."""


@dataclass(frozen=True)
class Word:
    """A word, its start and end in seconds, and the LLM's probability of its tokens."""

    word: str
    start: float
    end: float
    confidence: float


@dataclass
class Encoded:
    """One segment of an utterance, ready for every method."""

    samples: np.ndarray  # (S,) 16 kHz, the sound alone (`hdmole.speech.audio.framed`)
    offset: float  # seconds into the recording; below 0 where it begins with the sound
    states: Tensor  # (T, d_encoder)
    ctc: Tensor  # (T, vocabulary) log-probabilities
    posterior: Tensor  # (N + 1,)
    base: Decoded | None = None  # what the frozen base hears, once it was asked
    until: float = float("inf")  # seconds into the recording where the sound ends
    features: Tensor | None = None  # (T_mel, n_mels), where a method has an encoder of its own

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass
class Transcript:
    """What was heard, and why. `seconds` is the audio's length, `rtf` decoding time over audio time."""

    text: str
    words: list[Word]
    accent: dict[str, float]
    in_domain: dict[str, Any]
    seconds: float
    rtf: float
    method: str
    ctc_text: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    timing: str = "ctc"
    flags: list[str] = field(default_factory=list)  # what looks wrong with the text: loops, echoes, invention
    trace: Trace | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        kept = {k: v for k, v in vars(self).items() if k != "trace"}
        return {**kept, "words": [asdict(word) for word in self.words]}


def find_model(model: str | Path) -> Path:
    """The folder of a model: "demo", a path, or the name of a repository on the Hugging Face hub.

    Raises ModelError where there is none.
    """
    if str(model) == "demo":
        folder = Path(__file__).resolve().parents[2] / "assets" / "demo"
        if not (folder / "config.json").is_file():
            sentence = "The demo model is not here; run 'hdmole demo build', or give --model a folder or hub name."
            raise ModelError("model.no_demo", sentence)
        return folder
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            sentence = "The folder {folder} holds no config.json, so it is not a model; give the folder of a SpeechLLM."
            raise ModelError("model.no_config", sentence, folder=folder)
        return folder
    try:
        return Path(snapshot_download(str(model)))
    except Exception as error:  # offline, not found, no access: the hub has many classes for it
        raise ModelError(
            "model.not_found",
            "There is no folder {model}, and it could not be had from the Hugging Face hub ({reason}); "
            "check the name and the connection.",
            model=repr(model),
            reason=type(error).__name__,
        ) from None


class ASR:
    """A loaded model with all its methods; safe to use from several threads at once."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError:
            sentence = "{file} is not valid JSON, so the model cannot be loaded."
            raise ModelError("model.config_not_json", sentence, file=folder / "config.json") from None
        if config.get("model_type") != "speech_llm":
            raise ModelError(
                "model.other_type",
                "{folder} holds a {type} model; this tool transcribes with 'speech_llm' models "
                "(hdmole.models.speech_llm.SpeechLLM). Other models can be adapted in Python with get_peft_model.",
                folder=folder,
                type=repr(config.get("model_type")),
            )
        sizes = [config.get(part, {}).get("vocab_size") for part in ("audio_config", "text_config")]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ModelError(
                "model.two_vocabularies",
                "The CTC head of {folder} writes {ctc} tokens and its LLM {llm}; both need one vocabulary, as the words' "
                "times and the in-domain score come from comparing the two. Train the CTC head on the LLM's tokens.",
                folder=folder,
                ctc=sizes[0],
                llm=sizes[1],
            )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.extractor = AutoFeatureExtractor.from_pretrained(folder)
        base = SpeechLLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).to(self.device)
        self.models: dict[str, Any] = {"base": base}
        if (folder / "adapters" / "lora").is_dir():
            self.models["lora"] = _adapted(base, folder / "adapters" / "lora")
        if (folder / "adapters" / "full" / "model.safetensors").is_file():
            weights = load_file(folder / "adapters" / "full" / "model.safetensors")
            full = _with_own(base, weights)
            full.load_state_dict(weights, strict=False)
            self.models["full"] = full.float().eval()
            self._full_size = sum(w.numel() for w in weights.values())
        self.accents = [GENERAL]
        if (folder / "adapters" / "hdmole").is_dir():
            adapted = _adapted(base, folder / "adapters" / "hdmole")
            if not adapted.base_model.hdmole_recogniser:
                raise ModelError(
                    "model.no_recogniser",
                    "The HDMoLE adapter in {folder} carries no accent recogniser, so nothing says how to route; train it with "
                    "HDMoLEConfig(recogniser=recogniser.arguments) and set_recogniser.",
                    folder=folder,
                )
            self.models["hdmole"] = adapted
            self.accents += list(adapted.peft_config["default"].accents)
        towers = {name: model.get_base_model() if isinstance(model, PeftModel) else model for name, model in self.models.items()}
        self.own_encoder = {name for name, model in towers.items() if model.audio_tower is not base.audio_tower}
        self.domain = DomainScorer.load(folder / "domain.json") if (folder / "domain.json").is_file() else None

    @classmethod
    def load(cls, model: str | Path = "demo", device: str | None = None) -> ASR:
        """Load "demo", a folder or a hub name, onto the GPU where there is one. Raises ModelError."""
        folder = find_model(model)
        try:
            return cls(folder, device)
        except ModelError:
            raise
        except Exception as error:  # a damaged folder: every library that reads a part of it has its own classes
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(
                "model.damaged",
                "The model in {folder} cannot be loaded ({reason}); check that the folder is complete.",
                folder=folder,
                reason=f"{type(error).__name__}: {reason}",
            ) from error

    @property
    def methods(self) -> list[str]:
        """The methods this model has."""
        return [name for name in METHOD_NAMES if name in self.models]

    @property
    def seconds_per_frame(self) -> dict[str, float]:
        """Length of a frame by the part of the model whose layers see frames of audio; relative positions are no such frames."""
        step = float(self.models["base"].config.seconds_per_frame)
        return {"multi_modal_projector": step, "relative_k_proj": float("nan"), "audio_tower": step}

    @property
    def blank(self) -> int:
        """The CTC head's blank."""
        return int(self.models["base"].config.audio_config.pad_token_id)

    def trainable(self, method: str) -> int:
        """Parameters that the method trained."""
        model = self.models[method]
        if method == "base":
            return 0
        if method == "full":
            return self._full_size
        return sum(p.numel() for n, p in model.named_parameters() if ("hdmole_" in n and "recogniser" not in n) or "lora_" in n)

    def check_method(self, method: str) -> None:
        """Raise ModelError where this model has no such method."""
        if method not in self.models:
            sentence = "This model has no method {method}; it has {methods}."
            raise ModelError("model.no_such_method", sentence, method=repr(method), methods=", ".join(self.methods))

    def check_accent(self, accent: str) -> None:
        """Raise ModelError where no expert of this model has such an accent."""
        if accent != "auto" and accent not in self.accents:
            sentence = "There is no accent {accent}; give auto or one of {accents}."
            raise ModelError("model.no_such_accent", sentence, accent=repr(accent), accents=", ".join(self.accents))

    # -- encoding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, audio: Audio | np.ndarray) -> list[Encoded]:
        """Segments of one recording, ready for every method.

        One where it is short, or where CTC head and LLM agree on all of it; else one from pause to pause.
        """
        samples, config = _samples(audio), self.models["base"].config
        sound, start = framed(samples)
        if len(sound) <= config.longest_utterance * SAMPLE_RATE:
            whole = self._encoded(samples, sound, start)
            short = len(sound) <= config.longest_segment * SAMPLE_RATE
            if short or self.domain_features(whole)["character_disagreement"] < AGREED:
                return [whole]
        pieces = [(framed(samples[a:b]), a) for a, b in cut(samples, float(config.longest_segment))]
        return [self._encoded(samples, sound, a + first) for (sound, first), a in pieces]

    def _encoded(self, samples: np.ndarray, sound: np.ndarray, start: int) -> Encoded:
        """One segment: the `sound` that begins at sample `start` of a recording."""
        base = self.models["base"]
        batch = self.extractor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = torch.nan_to_num(batch["input_features"]).to(self.device)
        mask = batch["attention_mask"].to(self.device)
        states, states_mask = base.encode(features, mask)
        states = states[0][states_mask[0]]
        posterior = torch.ones(1)
        if "hdmole" in self.models:
            posterior = self.models["hdmole"].base_model.recognise((), {"input_features": features, "attention_mask": mask})[0]
        until = min(len(samples), start + len(sound)) / SAMPLE_RATE
        kept, ctc = features[0][mask[0].bool()] if self.own_encoder else None, base.ctc_log_probs(states[None])[0]
        return Encoded(sound, start / SAMPLE_RATE, states, ctc, posterior, until=until, features=kept)

    def posterior_of(self, segment: Encoded, accent: str) -> Tensor:
        """The posterior (N + 1,) that routes: what was heard ("auto") or certainty of a named accent."""
        if accent == "auto":
            return segment.posterior
        self.check_accent(accent)
        return torch.eye(len(self.accents), device=self.device)[self.accents.index(accent)]

    # -- decoding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_batch(self, segments: list[Encoded], method: str, accent: str = "auto") -> list[Decoded]:
        """Greedy transcripts of many segments at once, with the log-probability of every token."""
        self.check_method(method)
        posterior = torch.stack([self.posterior_of(s, accent) for s in segments]) if method == "hdmole" else None
        return greedy(self.models[method], self._states(segments, method, posterior), self.tokenizer, posterior)

    def _states(self, segments: list[Encoded], method: str, posterior: Tensor | None) -> list[Tensor]:
        """What the encoder, shared or the method's own, says of the segments."""
        if method not in self.own_encoder:
            return [s.states for s in segments]
        return encode_all(self.models[method], [s.features for s in segments if s.features is not None], posterior)

    def ctc_text(self, segment: Encoded) -> str:
        """What the CTC head alone hears, greedily."""
        best = segment.ctc.argmax(-1)
        kept = torch.unique_consecutive(best)
        return str(self.tokenizer.decode(kept[kept != self.blank], skip_special_tokens=True)).strip()

    def transcribe(
        self,
        audio: Audio | np.ndarray,
        method: str = "hdmole",
        accent: str = "auto",
        *,
        want_trace: bool = False,
        intervention: dict[str, Any] | None = None,
        encoded: list[Encoded] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Transcript:
        """Transcribe one recording.

        Parameters
        ----------
        audio : decoded audio, or samples (S,) at 16 kHz
        method : base, lora, full or hdmole
        accent : "auto" or the name of an accent to route by
        want_trace : keep the full trace of the routing (HDMoLE only)
        intervention : keywords of `hdmole.intervene`, for this call
        encoded : what `encode` gave for this audio, to spare doing it again
        progress : called with the share that is done after each segment of long audio; what it raises ends the work

        Raises
        ------
        ModelError : no such method or accent
        """
        self.check_method(method)
        started = time.perf_counter()
        segments = self.encode(audio) if encoded is None else encoded
        words: list[Word] = []
        texts, layers, timing = [], [], "ctc"
        recorded: Trace | None = None
        for number, segment in enumerate(segments, start=1):
            with ExitStack() as stack:
                if method == "hdmole":
                    if intervention:
                        stack.enter_context(intervene(self.models[method], **intervention))
                    recorded = stack.enter_context(trace(self.models[method], seconds_per_frame=self.seconds_per_frame))
                result = self.decode_batch([segment], method, accent)[0]
            if method == "base":
                segment.base = result
            texts.append(result.text)
            timed, kind = self._words(segment, result)
            timing = kind if kind != "ctc" else timing
            words += timed
            if recorded is not None:
                layers.append(recorded.shifted(segment.offset))  # below 0 in the quiet that was put before the recording
            if progress:
                progress(number / len(segments))
        full_trace = Trace.join(layers) if layers else None
        seconds = len(_samples(audio)) / SAMPLE_RATE
        sounded = [self.ctc_text(s) for s in segments]
        found = [f for t, c, s in zip(texts, sounded, segments, strict=True) for f in flags(t, c, s.seconds)]
        elapsed = time.perf_counter() - started
        return Transcript(
            text=" ".join(filter(None, texts)),
            words=words,
            accent=dict(zip(self.accents, _mean_posterior(segments), strict=False)),
            in_domain=self.in_domain(segments),
            seconds=round(seconds, 3),
            rtf=round(elapsed / max(seconds, 1e-9), 4),
            method=method,
            ctc_text=" ".join(filter(None, sounded)),
            flags=list(dict.fromkeys(found)),
            layers=layer_summary(full_trace) if full_trace is not None else [],
            timing=timing,
            trace=full_trace if want_trace else None,
        )

    @torch.no_grad()
    def attribution(self, segment: Encoded, accent: str = "auto") -> list[dict[str, Any]]:
        """What each expert was worth to each word HDMoLE heard in a segment.

        One entry a word: `word`, `start`, `end` (s) and `change`, for each expert the change in the word's log-probability
        (nats) when that expert alone is left out; below zero it helped. Raises ModelError for a model without HDMoLE.
        """
        self.check_method("hdmole")
        result = self.decode_batch([segment], "hdmole", accent)[0]
        words, _ = self._words(segment, result)
        labels = torch.tensor([result.ids], device=self.device)
        posterior = self.posterior_of(segment, accent)[None]

        def scores() -> Tensor:
            (states,) = self._states([segment], "hdmole", posterior)
            mask = torch.ones(1, len(states), dtype=torch.bool, device=self.device)
            with route(posterior):
                out = self.models["hdmole"](encoder_states=states[None], encoder_mask=mask, labels=labels)
            log_probs = out.logits[0, -len(result.ids) - 1 : -1].float().log_softmax(-1)
            return log_probs.gather(1, labels[0][:, None])[:, 0]

        whole, changes = scores(), {}
        for expert in self.accents[1:]:
            with intervene(self.models["hdmole"], mask=[expert]):
                changes[expert] = (scores() - whole).tolist()
        tokens, groups = self._groups(result.ids)
        return [
            {"word": w.word, "start": w.start, "end": w.end,
             "change": {expert: round(sum(change[tokens[k]] for k in found), 4) for expert, change in changes.items()}}
            for w, (_, found) in zip(words, groups, strict=True)
        ]  # fmt: skip

    def in_domain(self, segments: list[Encoded]) -> dict[str, Any]:
        """Whether the audio is inside what the model was made for: score 0 to 1, verdict, reasons; by the base model."""
        if self.domain is None:
            return {"score": None, "verdict": None, "reasons": ["this model has no in-domain score"]}
        found = [self.domain.score(self.domain_features(segment)) for segment in segments]
        spans = [(segment.offset, segment.offset + segment.seconds) for segment in segments]
        return found[0] if len(found) == 1 else verdict_of_all(found, spans)

    def domain_features(self, segment: Encoded, heard: Decoded | None = None) -> dict[str, float]:
        """What the in-domain score looks at, for one segment and what the base model heard in it."""
        if heard is None:
            heard = segment.base = segment.base or self.decode_batch([segment], "base")[0]
        tokens, _ = self._groups(heard.ids)
        aligned = align(segment.ctc, [heard.ids[k] for k in tokens], self.blank)
        return domain_features(
            samples=segment.samples,
            ctc_log_probs=segment.ctc.cpu().numpy(),
            ctc_text=self.ctc_text(segment),
            text=heard.text,
            token_log_probs=heard.log_probs,
            alignment_score=aligned[1] if aligned else None,
            posterior=segment.posterior.cpu().numpy(),
            blank=self.blank,
        )

    def _groups(self, ids: list[int]) -> tuple[list[int], list[tuple[str, list[int]]]]:
        """Positions of the tokens that are text, and the words with the numbers of those that spell each."""
        special = set(self.tokenizer.all_special_ids)
        tokens = [k for k, i in enumerate(ids) if i not in special]
        words = str(self.tokenizer.decode([ids[k] for k in tokens])).split()
        found: list[list[int]] = [[] for _ in words]
        for n in range(len(tokens)):  # a token belongs to the word that stands last once it is there
            text = str(self.tokenizer.decode([ids[k] for k in tokens[: n + 1]]))
            if words:
                found[min(max(0, len(text.split()) - 1), len(words) - 1)].append(n)
        return tokens, [(word, numbers) for word, numbers in zip(words, found, strict=True) if numbers]

    def _words(self, segment: Encoded, result: Decoded) -> tuple[list[Word], str]:
        tokens, groups = self._groups(result.ids)
        if not groups:
            return [], "ctc"
        aligned = align(segment.ctc, [result.ids[k] for k in tokens], self.blank)
        step = self.seconds_per_frame["multi_modal_projector"]
        if aligned is None:
            width = segment.seconds / len(tokens)
            spans, timing = [(k * width, (k + 1) * width) for k in range(len(tokens))], "uniform"
        else:
            spans, timing = [(a * step, (b + 1) * step) for a, b in aligned[0]], "ctc"
        words = []
        for word, found in groups:
            times = spans[found[0]][0] + segment.offset, spans[found[-1]][1] + segment.offset
            start, end = (min(max(0.0, t), segment.until) for t in times)
            confidence = float(np.exp(sum(result.log_probs[tokens[n]] for n in found)))
            words.append(Word(word, round(start, 3), round(end, 3), round(confidence, 4)))
        return words, timing


def _with_own(base: SpeechLLM, changed: Iterable[str]) -> SpeechLLM:
    """A copy of the model that shares everything but the parts in which the modules or weights `changed` lie."""
    parts = {"multi_modal_projector", *(name.split(".")[0] for name in changed)}
    model = copy.copy(base)
    model._modules = dict(base._modules)
    model._forward_pre_hooks = copy.copy(base._forward_pre_hooks)
    model._forward_pre_hooks_with_kwargs = copy.copy(base._forward_pre_hooks_with_kwargs)
    for part in parts & set(base._modules):
        model._modules[part] = copy.deepcopy(base._modules[part])
    return model


def _adapted(base: SpeechLLM, folder: Path) -> Any:
    """The base with a PEFT adapter, its own copy of what the adapter changes."""
    config = PeftConfig.from_pretrained(str(folder))
    names = [n for n, _ in base.named_modules() if n]
    saved = set(getattr(config, "modules_to_save", None) or ())
    changed = [n for n in names if check_target_module_exists(config, n) or saved & set(n.split("."))]
    return PeftModel.from_pretrained(_with_own(base, changed), folder).eval()  # type: ignore[arg-type]


def _samples(audio: Audio | np.ndarray) -> np.ndarray:
    return audio.samples if isinstance(audio, Audio) else np.asarray(audio, np.float32)


def _mean_posterior(segments: list[Encoded]) -> list[float]:
    weights = np.array([s.seconds for s in segments])
    stacked = np.stack([s.posterior.cpu().numpy() for s in segments])
    return [round(float(p), 4) for p in (weights[:, None] * stacked).sum(0) / weights.sum()]


def layer_summary(recorded: Trace) -> list[dict[str, Any]]:
    """Means over frames for each layer: active experts, gate of each expert, thresholds."""
    summary = []
    for name in recorded.layer_names:
        a = recorded.arrays(name)
        summary.append(
            {
                "name": name,
                "active_experts": round(float(a["n_active"].mean()), 3),
                "gate": {e: round(float(v), 4) for e, v in zip(recorded.experts, a["gate"].mean(0), strict=True)},
                "tau_global": round(float(a["tau_global"].mean()), 5),
                "tau_local": round(float(a["tau_local"].mean()), 5),
            }
        )
    return summary
