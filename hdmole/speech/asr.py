"""`ASR`: the one object that transcribes. The command line, the app and the evaluation all use it.

* `segment` cuts a recording into segments and encodes each of them once: mel features, encoder
  states, CTC posteriors and accent posterior. Every method (frozen base, LoRA, full fine-tuning,
  HDMoLE) then decodes from these.
* A method whose adapter changes the encoder encodes each segment again with its own encoder when it
  decodes.
* Word times come from the CTC head, or from the cross-attention of a model without one; word
  confidences come from the LLM or the decoder.
* No argument is modified. Transcripts of the frozen base are returned in new `Encoded` records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from hdmole.method.intervention import intervene
from hdmole.method.recogniser import LayerRecogniser
from hdmole.method.routing import route
from hdmole.method.tracing import Trace, trace
from hdmole.method.tuner import HDMoLEConfig, HDMoLEModel
from hdmole.models.speech_llm import encode_all
from hdmole.models.whisper import layer_statistics
from hdmole.names import GENERAL, METHOD_NAMES, SHARED
from hdmole.speech.alignment import align
from hdmole.speech.audio import SAMPLE_RATE, Audio, samples_of
from hdmole.speech.decoding import Decoded, Encoded, Word, ctc_text, greedy, timed_words, word_tokens
from hdmole.speech.domain import PHRASES, UNSPOKEN, DomainScorer, decoder_features, domain_features, flags, verdict_of_all
from hdmole.speech.loading import ACCENTS, FULL, ModelError, find_model, load_models, load_tokenizer, weights_folder
from hdmole.speech.mel import mel_features
from hdmole.speech.segments import LONG_PAUSE, Span, cut, framed, heard_whole, pauses, stretches


@dataclass
class Transcript:
    """What one method heard in a recording, with its words, accent and routing.

    `seconds` is the length of the audio. `rtf` is the time of decoding divided by it.
    """

    text: str
    words: list[Word]
    accent: dict[str, float]
    in_domain: dict[str, Any]
    seconds: float
    rtf: float
    method: str
    ctc_text: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    # where the words' times come from: ctc, attention, or "none" if nothing aligns words; "uniform"
    # if a segment's tokens do not fit into the frames of the CTC head
    timing: str = "ctc"
    # what looks wrong with the text: loops, echoes, invention
    flags: list[str] = field(default_factory=list)
    trace: Trace | None = field(default=None, repr=False)
    # the segments, with what the frozen base hears
    encoded: list[Encoded] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON. Words without times have None there."""
        kept = {k: v for k, v in vars(self).items() if k not in ("trace", "encoded")}
        words = [{k: None if v != v else v for k, v in asdict(word).items()} for word in self.words]
        return {**kept, "words": words}


class ASR:
    """A loaded model with all its methods. Several threads may use it at once."""

    def __init__(self, folder: Path, device: str | None = None, adapters: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.models = load_models(folder, self.device, adapters)
        base, weights = self.models["base"], weights_folder(folder)
        self.tokenizer = load_tokenizer(weights)
        self.extractor = base.extractor(weights)
        # it reads the layers of the frozen encoder; other models have one in their HDMoLE adapter
        self.recogniser = LayerRecogniser.load(folder / ACCENTS).to(self.device) if (folder / ACCENTS).is_dir() else None
        self.accents = [GENERAL]  # those of the experts are the same for all HDMoLE adapters
        if self.routed:
            self.accents += self.gate(self.routed[0]).accents
        towers = {name: model.get_base_model() if isinstance(model, PeftModel) else model for name, model in self.models.items()}
        self.own_encoder = {name for name, model in towers.items() if model.speech_encoder is not base.speech_encoder}
        self.domain = DomainScorer.load(folder / "domain.json") if (folder / "domain.json").is_file() else None

    @classmethod
    def load(
        cls, model: str | Path = "demo", device: str | None = None, adapters: Sequence[Path] = (), revision: str | None = None
    ) -> ASR:
        """Load a model onto the GPU, or onto the CPU if there is none.

        Args:
            model: "demo", "real", a folder, or the name of a repository on the Hugging Face hub.
            device: a torch device in place of the default.
            adapters: folders of PEFT adapters. Each is a method under the name of its folder,
                beside those in the model's folder.
            revision: branch, tag or commit of the repository on the hub.

        Raises:
            ModelError: there is no such model, or it cannot be loaded.
        """
        folder = find_model(model, revision)
        try:
            return cls(folder, device, adapters)
        except ModelError:
            raise
        # each library that reads a part of the folder has error classes of its own
        except Exception as error:
            said = (str(error).splitlines() or [""])[0].partition(". ")[0]
            # transformers adds advice about its hub, and lists of keys
            reason = f"{type(error).__name__}: {said}" if len(said) <= 120 and "http" not in said else type(error).__name__
            sentence = "The model in {folder} cannot be loaded ({reason}); check that the folder is complete."
            raise ModelError("model.damaged", sentence, folder=folder, reason=reason) from error

    @property
    def methods(self) -> list[str]:
        """The methods this model has: those of `METHOD_NAMES` in their order, then others."""
        return sorted(self.models, key=lambda name: ([*METHOD_NAMES, name].index(name), name))

    @property
    def default(self) -> str:
        """The method that is used if none is named: hdmole, else another HDMoLE adapter, else the
        last.
        """
        return "hdmole" if "hdmole" in self.models else next(iter(self.routed), self.methods[-1])

    @property
    def routed(self) -> list[str]:
        """Those of the methods that are HDMoLE adapters."""
        return [name for name in self.methods if isinstance(getattr(self.models[name], "base_model", None), HDMoLEModel)]

    def gate(self, method: str) -> HDMoLEConfig:
        """The configuration of an HDMoLE adapter, which says what its gate is.

        Raises ModelError if the model has no such adapter.
        """
        if method not in self.routed:
            self.check_method(method)
            sentence = "The method {method} is no HDMoLE adapter, so it has no routing."
            raise ModelError("model.not_routed", sentence, method=repr(method))
        config: HDMoLEConfig = self.models[method].peft_config["default"]
        return config

    @property
    def seconds_per_frame(self) -> dict[str, float]:
        """Seconds between two frames that a layer sees, by the part of the model it lies in.

        It is NaN for layers that see no frames of audio.
        """
        return dict(self.models["base"].seconds_per_frame)

    @property
    def blank(self) -> int | None:
        """Id of the CTC head's blank; None if the model has no CTC head."""
        blank: int | None = self.models["base"].blank
        return blank

    def trainable(self, method: str) -> int:
        """Number of parameters that the method trained."""
        model = self.models[method]
        if method == "base":
            return 0
        if method == "full":
            return sum(weights.numel() for weights in load_file(self.folder / FULL).values())
        return sum(p.numel() for n, p in model.named_parameters() if ("hdmole_" in n and "recogniser" not in n) or "lora_" in n)

    def check_method(self, method: str) -> None:
        """Raise ModelError if this model has no such method."""
        if method not in self.models:
            sentence = "This model has no method {method}; it has {methods}."
            raise ModelError("model.no_such_method", sentence, method=repr(method), methods=", ".join(self.methods))

    def check_accent(self, accent: str) -> None:
        """Raise ModelError unless `accent` is "auto", "general" or the accent of an expert."""
        if accent != "auto" and accent not in self.accents:
            sentence = "There is no accent {accent}; give auto or one of {accents}."
            raise ModelError("model.no_such_accent", sentence, accent=repr(accent), accents=", ".join(self.accents))

    # -- encoding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def segment(self, audio: Audio | np.ndarray, between: Callable[[], None] = lambda: None) -> list[Encoded]:
        """Cut a recording into segments and encode each of them for every method.

        Only what Silero VAD takes for speech is heard. There is one segment if the sound is short
        and without a long pause, or if it is of medium length and the CTC head and the LLM of the
        frozen base agree on it. Otherwise the recording is cut at its pauses. A model that was
        trained on whole recordings gets as long segments as it can hear. If nobody speaks, there is
        one segment that says so.

        Args:
            audio: decoded audio, or samples (S,) at 16 kHz.
            between: called after each half minute in which speech is looked for, and after each
                segment. An error that it raises ends the work.

        Raises:
            AudioError: the samples have another shape, or some are not numbers.
        """
        return list(self.segments(audio, between))

    def segments(self, audio: Audio | np.ndarray, between: Callable[[], None] = lambda: None) -> Iterator[Encoded]:
        """`segment`, one segment after the other: of a long recording the first ones are ready
        early.
        """
        samples, model = samples_of(audio), self.models["base"]
        coming = stretches(samples, between)
        # as many stretches as tell that the recording is longer than an utterance, with a margin
        # for the quiet around it
        spans = []
        for span in coming:
            spans.append(span)
            if span[1] - spans[0][0] > (model.longest_utterance + 2) * SAMPLE_RATE:
                break
        else:
            if (short := self._short(samples, spans)) is not None:
                yield short
                return
        for sound, start in cut(samples, chain(spans, coming), model.longest_segment, model.whole_recordings):
            yield self.encode(sound, start, len(samples))
            between()

    @torch.no_grad()
    def _short(self, samples: np.ndarray, spans: list[Span]) -> Encoded | None:
        """The only segment of a recording that can be heard as one; None if it has to be cut."""
        model = self.models["base"]
        if not spans:
            sound, start = framed(samples[: int(model.longest_segment * SAMPLE_RATE)])
            return replace(self.encode(sound, start, len(samples)), spoken=False)
        sound, start = framed(samples, spans)
        seconds, whole_only = len(sound) / SAMPLE_RATE, model.whole_recordings
        if seconds <= model.longest_utterance:
            whole = self.encode(sound, start, len(samples))
            if seconds <= model.longest_segment and (whole_only or max(pauses(spans), default=0.0) < LONG_PAUSE):
                return whole
            whole, base = self._asked(whole)
            if heard_whole(self.ctc_text(whole), base.text):
                return whole
        return None

    @torch.no_grad()
    def encode(self, sound: np.ndarray, start: int, length: int) -> Encoded:
        """Encode one segment for every method; nothing is decoded.

        Args:
            sound: (S,) samples at 16 kHz without the quiet around them, as
                `hdmole.speech.segments.framed` returns them.
            start: index in the recording of the first sample; negative if silence was added before
                the recording.
            length: number of samples in the recording.
        """
        base = self.models["base"]
        features, mask = (x.to(self.device) for x in mel_features(self.extractor, sound))
        posterior, posteriors = torch.ones(1), {}
        if self.recogniser is not None:
            layers, states_mask = base.encode_layers(features, mask)
            states, posterior = layers[-1], self.recogniser.posterior(layer_statistics(layers, states_mask))[0]
        else:
            states, states_mask = base.encode(features, mask)
            posteriors = {method: self._recognised(method, features, mask) for method in self.routed}
        states = states[0][states_mask[0]]
        return Encoded(
            samples=sound,
            offset=start / SAMPLE_RATE,
            states=states,
            ctc=None if self.blank is None else base.ctc_log_probs(states[None])[0],
            posterior=next(iter(posteriors.values()), posterior),
            posteriors=posteriors,
            until=min(length, start + len(sound)) / SAMPLE_RATE,
            features=features[0][mask[0].bool()] if self.own_encoder else None,
        )

    def _recognised(self, method: str, features: Tensor, mask: Tensor) -> Tensor:
        """Posterior (N + 1,) of mel features (1, T, n_mels), by the recogniser of a method's
        adapter.
        """
        tuner = self.models[method].base_model
        if tuner.hdmole_recogniser["default"].arguments["feature_layout"] == "mel_first":
            features = features.transpose(1, 2)
        posterior: Tensor = tuner.recognise((), {"input_features": features, "attention_mask": mask})[0]
        return posterior

    def posterior_of(self, segment: Encoded, accent: str, method: str = "hdmole") -> Tensor:
        """The posterior (N + 1,) by which a `method` with routing is routed.

        For "auto" it is that of the adapter's own recogniser. Otherwise `accent` has probability 1.
        Raises ModelError if the model has no such accent.
        """
        if accent == "auto":
            return segment.posterior_of(method)
        self.check_accent(accent)
        return torch.eye(len(self.accents), device=self.device)[self.accents.index(accent)]

    # -- decoding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_batch(self, segments: list[Encoded], method: str, accent: str = "auto") -> list[Decoded]:
        """Greedy transcripts of several segments at once, with the log-probability of every token.

        Raises ModelError if the model has no such method or accent.
        """
        self.check_method(method)
        posterior = torch.stack([self.posterior_of(s, accent, method) for s in segments]) if method in self.routed else None
        found = greedy(self.models[method], self._states(segments, method, posterior), self.tokenizer, posterior)
        nothing = Decoded("", [self.tokenizer.eos_token_id], [0.0])
        return [heard if segment.spoken else nothing for heard, segment in zip(found, segments, strict=True)]

    def _states(self, segments: list[Encoded], method: str, posterior: Tensor | None) -> list[Tensor]:
        """Encoder states (T, d_encoder) of each segment, by the method's encoder if it has one."""
        if method not in self.own_encoder:
            return [s.states for s in segments]
        return encode_all(self.models[method], [s.features for s in segments if s.features is not None], posterior)

    def frames(self, segment: Encoded) -> int:
        """Number of encoder frames of a segment's sound, without those of silence added after it."""
        return len(segment.states) - int(self.models["base"].silent_frames)

    def ask_base(self, segments: Sequence[Encoded]) -> list[Encoded]:
        """The segments with the transcripts of the frozen base.

        Only segments without such a transcript are decoded.
        """
        return [self._asked(segment)[0] for segment in segments]

    def _asked(self, segment: Encoded) -> tuple[Encoded, Decoded]:
        base = segment.base or self.decode_batch([segment], "base")[0]
        return replace(segment, base=base), base

    def ctc_text(self, segment: Encoded) -> str:
        """What the CTC head alone hears in a segment; empty if the model has no CTC head."""
        if segment.ctc is None or self.blank is None:
            return ""
        return ctc_text(segment.ctc, self.tokenizer, self.blank)

    def _words(self, segment: Encoded, heard: Decoded) -> tuple[list[Word], str]:
        step = self.seconds_per_frame.get("multi_modal_projector", float("nan"))  # the CTC head's frames are the projector's
        return timed_words(segment, heard, self.tokenizer, self.blank, step)

    def transcribe(
        self,
        audio: Audio | np.ndarray,
        method: str = "hdmole",
        accent: str = "auto",
        *,
        want_trace: bool = False,
        intervention: dict[str, Any] | None = None,
        encoded: Iterable[Encoded] | None = None,
        progress: Callable[[float], None] | None = None,
        heard: Callable[[list[Word]], None] | None = None,
    ) -> Transcript:
        """Transcribe one recording.

        Args:
            audio: decoded audio, or samples (S,) at 16 kHz.
            method: one of `methods`.
            accent: "auto", or the name of an accent to route by.
            want_trace: keep the full trace of the routing (HDMoLE adapters only).
            intervention: keywords of `hdmole.intervene`, for this call.
            encoded: segments of this audio, from `segment`, `segments` or the `encoded` of another
                method's transcript. They are not encoded again. Those of a transcript already hold
                what the base heard, which the in-domain score needs.
            progress: called after each segment with the share that is done, 0 to 1. An error that
                it raises ends the work.
            heard: called after each segment with all words so far.

        Raises:
            ModelError: the model has no such method or accent.
        """
        self.check_method(method)
        started, waited = time.perf_counter(), 0.0  # seconds that were not the work of this method
        length = len(samples_of(audio)) / SAMPLE_RATE
        segments: list[Encoded] = []
        words: list[Word] = []
        texts, layers, timing = [], [], ""
        recorded: Trace | None = None
        coming = iter(self.segments(audio) if encoded is None else encoded)
        while True:
            began = time.perf_counter()
            segment = next(coming, None)
            if segment is None:
                break
            waited += time.perf_counter() - began if encoded is not None else 0.0
            segments.append(segment)
            with ExitStack() as stack:
                if method in self.routed:
                    if intervention:
                        stack.enter_context(intervene(self.models[method], **intervention))
                    sounding = slice(0, self.frames(segment)) if self.frames(segment) < len(segment.states) else None
                    tracing = trace(self.models[method], frames=sounding, seconds_per_frame=self.seconds_per_frame)
                    recorded = stack.enter_context(tracing)
                result = self.decode_batch([segment], method, accent)[0]
            if method == "base":
                segments[-1] = replace(segment, base=result)
            texts.append(result.text)
            timed, kind = self._words(segment, result)
            timing = "uniform" if "uniform" in (kind, timing) else kind
            words += timed
            if recorded is not None:
                # times are negative in silence added before the recording
                layers.append(recorded.shifted(segment.offset))
            if self.domain is not None:
                began = time.perf_counter()
                segments[-1] = self._judged(segments[-1])
                waited += time.perf_counter() - began
            if heard:
                heard(list(words))
            if progress:
                progress(len(segments) / len(encoded) if isinstance(encoded, list) else min(1.0, segment.until / length))
        full_trace = Trace.join(layers) if layers else None
        seconds = len(samples_of(audio)) / SAMPLE_RATE
        sounded = [self.ctc_text(s) for s in segments]
        compared = [None if s.ctc is None else c for c, s in zip(sounded, segments, strict=True)]
        found = [f for t, c, s in zip(texts, compared, segments, strict=True) for f in flags(t, c, s.seconds)]
        elapsed = time.perf_counter() - started - waited
        return Transcript(
            text=" ".join(filter(None, texts)),
            words=words,
            accent=dict(zip(self.accents, _mean_posterior(segments, method), strict=False)),
            in_domain=self.in_domain(segments),
            seconds=round(seconds, 3),
            rtf=round(elapsed / max(seconds, 1e-9), 4),
            method=method,
            ctc_text=" ".join(filter(None, sounded)),
            flags=list(dict.fromkeys(found)),
            layers=layer_summary(full_trace) if full_trace is not None else [],
            timing=timing,
            trace=full_trace if want_trace else None,
            encoded=segments,
        )

    @torch.no_grad()
    def likelihoods(
        self, segment: Encoded, changes: Sequence[dict[str, Any]], accent: str = "auto", method: str = "hdmole"
    ) -> list[dict[str, Any]]:
        """How likely the words that an HDMoLE adapter hears in a segment are under changed routing.

        The words stay those of the adapter as trained, so that an effect shows before another word
        is heard.

        Args:
            segment: the segment.
            changes: keywords of `hdmole.intervene`, for each change.
            accent: "auto", or the name of an accent to route by.
            method: an HDMoLE adapter.

        Returns:
            One entry for each word: `word`, `start` and `end` in seconds, its log-probability
            (nats) as trained, `before`, and under each change, `after`.

        Raises:
            ModelError: the model has no such HDMoLE adapter, or no such accent.
        """
        self.gate(method)
        model, result = self.models[method], self.decode_batch([segment], method, accent)[0]
        words, _ = self._words(segment, result)
        labels = torch.tensor([result.ids], device=self.device)
        posterior = self.posterior_of(segment, accent, method)[None]
        tokens, groups = word_tokens(result.ids, self.tokenizer)

        def scores() -> list[float]:
            """The log-probability of each word."""
            (states,) = self._states([segment], method, posterior)
            mask = torch.ones(1, len(states), dtype=torch.bool, device=self.device)
            with route(posterior):
                out = model(encoder_states=states[None], encoder_mask=mask, labels=labels)
            log_probs = out.logits[0, -len(result.ids) - 1 : -1].float().log_softmax(-1)
            found: list[float] = log_probs.gather(1, labels[0][:, None])[:, 0].tolist()
            return [sum(found[tokens[k]] for k in numbers) for _, numbers in groups]

        before, after = scores(), []
        for change in changes:
            with intervene(model, **change):
                after.append(scores())
        return [
            {"word": w.word, "start": w.start, "end": w.end, "before": before[k], "after": [found[k] for found in after]}
            for k, w in enumerate(words)
        ]

    def attribution(self, segment: Encoded, accent: str = "auto", method: str = "hdmole") -> list[dict[str, Any]]:
        """What each expert was worth to each word that an HDMoLE adapter heard in a segment.

        Returns:
            One entry for each word: `word`, `start` and `end` in seconds, and `change`. For each
            expert, `change` is how much the word's log-probability (nats) changes when this expert
            alone is left out. It is negative where the expert helped. The shared expert, if there
            is one, comes last.

        Raises:
            ModelError: the model has no such HDMoLE adapter, or no such accent.
        """
        experts = [*self.gate(method).accents, *([SHARED] if self.gate(method).shared_expert_rank else [])]
        return [
            {"word": word["word"], "start": word["start"], "end": word["end"],
             "change": {expert: round(after - word["before"], 4) for expert, after in zip(experts, word["after"], strict=True)}}
            for word in self.likelihoods(segment, [{"mask": [expert]} for expert in experts], accent, method)
        ]  # fmt: skip

    def in_domain(self, segments: Sequence[Encoded]) -> dict[str, Any]:
        """Whether the audio is of the kind that the model was made for.

        It is judged by what the frozen base hears in the segments.

        Returns:
            `score` from 0 to 1, `verdict` (true: in domain) and `reasons` in words. For several
            segments also `outside`, the spans in seconds of the segments that are out of domain.
            Score and verdict are None if the model has no such score, and somebody speaks.
        """
        if not any(segment.spoken for segment in segments):
            return {"score": 0.0 if self.domain else None, "verdict": False, "reasons": [UNSPOKEN]}
        if self.domain is None:
            return {"score": None, "verdict": None, "reasons": ["this model has no in-domain score"]}
        found = [segment.score or self._scored(self.domain, segment) for segment in segments]
        spans = [(segment.offset, segment.offset + segment.seconds) for segment in segments]
        return found[0] if len(found) == 1 else verdict_of_all(found, spans)

    def _judged(self, segment: Encoded) -> Encoded:
        """The segment with what the base hears and with its in-domain score."""
        if segment.score is not None or self.domain is None:
            return segment
        segment, _ = self._asked(segment)
        return replace(segment, score=self._scored(self.domain, segment))

    def _scored(self, domain: DomainScorer, segment: Encoded) -> dict[str, Any]:
        """The score of one segment; without a word it is out of domain."""
        _, base = asked = self._asked(segment)
        if base.text:
            return domain.score(self.domain_features(*asked))
        return {"score": 0.0, "verdict": False, "reasons": [PHRASES["empty"] if segment.spoken else UNSPOKEN]}

    def domain_features(self, segment: Encoded, base: Decoded) -> dict[str, float]:
        """The features of the in-domain score, by name. `base` is the base's transcript."""
        if segment.ctc is None or self.blank is None:
            mask = torch.ones(1, len(segment.states), dtype=torch.bool, device=self.device)
            return decoder_features(
                segment.samples, base.text, base.log_probs, segment.posterior.cpu().numpy(),
                float(self.models["base"].english(segment.states[None], mask)[0]),
            )  # fmt: skip
        tokens, _ = word_tokens(base.ids, self.tokenizer)
        aligned = align(segment.ctc, [base.ids[k] for k in tokens], self.blank)
        return domain_features(
            samples=segment.samples,
            ctc_log_probs=segment.ctc.cpu().numpy(),
            ctc_text=self.ctc_text(segment),
            text=base.text,
            token_log_probs=base.log_probs,
            alignment_score=aligned[1] if aligned else None,
            posterior=segment.posterior.cpu().numpy(),
            blank=self.blank,
        )


def _mean_posterior(segments: list[Encoded], method: str) -> list[float]:
    weights = np.array([s.seconds for s in segments])
    stacked = np.stack([s.posterior_of(method).cpu().numpy() for s in segments])
    return [round(float(p), 4) for p in (weights[:, None] * stacked).sum(0) / weights.sum()]


def layer_summary(recorded: Trace) -> list[dict[str, Any]]:
    """Means over frames for each layer.

    `effective_experts` is the effective number of experts (`hdmole.method.gate.effective`), and
    `active_experts` how many have any weight. `share` is what each expert carries of the change of
    the layer's output, over all frames together, the shared expert last if there is one.
    """
    summary = []
    for name in recorded.layer_names:
        a = recorded.arrays(name)
        shares = np.concatenate([a["share"], a["shared_share"][:, None]], 1)
        energy = a["change"][:, None].astype(float) ** 2
        share = (shares * energy).sum(0) / max(float(energy.sum()), 1e-30)
        carriers = [*recorded.experts, *([SHARED] if a["shared_share"].any() else [])]
        summary.append(
            {
                "name": name,
                "effective_experts": round(float(a["n_effective"].mean()), 3),
                "active_experts": round(float(a["n_active"].mean()), 3),
                "gate": {e: round(float(v), 4) for e, v in zip(recorded.experts, a["gate"].mean(0), strict=True)},
                "share": {e: round(float(v), 4) for e, v in zip(carriers, share, strict=False)},
                "tau_global": round(float(a["tau_global"].mean()), 5),
                "tau_local": round(float(a["tau_local"].mean()), 5),
            }
        )
    return summary
