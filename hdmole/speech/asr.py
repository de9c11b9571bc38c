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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from hdmole.method.intervention import intervene
from hdmole.method.recogniser import LayerRecogniser
from hdmole.method.routing import layers_of
from hdmole.method.tracing import Trace, trace
from hdmole.method.tuner import HDMoLEConfig, HDMoLEModel
from hdmole.models.speech_llm import encode_all
from hdmole.models.whisper import layer_statistics
from hdmole.names import GENERAL, METHOD_NAMES, SHARED
from hdmole.speech.alignment import align
from hdmole.speech.audio import SAMPLE_RATE, Audio, samples_of
from hdmole.speech.decoding import Decoded, Encoded, Word, ctc_text, greedy, timed_words, word_log_probs, word_tokens
from hdmole.speech.domain import PHRASES, UNSPOKEN, DomainScorer, decoder_features, domain_features, verdict_of_all
from hdmole.speech.loading import ACCENTS, FULL, ModelError, find_model, load_models, load_scores, load_tokenizer, weights_folder
from hdmole.speech.mel import mel_features
from hdmole.speech.segments import LONG_PAUSE, Span, cut, framed, heard_whole, pauses, stretches
from hdmole.speech.stopping import make_stoppable
from hdmole.speech.transcript import Heard, Transcript, joined, together


class ASR:
    """A loaded model with all its methods. Several threads may use it at once."""

    def __init__(self, folder: Path, device: str | None = None, adapters: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.models = load_models(folder, self.device, adapters)
        make_stoppable(self.models.values())
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
        self.domain = load_scores(folder, adapters)  # by method

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
        return self._decoded(segments, method, self._states(segments, method, posterior), posterior)

    def _decoded(self, segments: list[Encoded], method: str, states: list[Tensor], posterior: Tensor | None) -> list[Decoded]:
        """What a method's decoder writes from its encoder's states (T, d_encoder) of each segment."""
        found = greedy(self.models[method], states, self.tokenizer, posterior)
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

        Only segments without such a transcript are decoded, several at once.
        """
        found = {k: segment for k, segment in enumerate(segments) if segment.base}
        missing = [k for k in range(len(segments)) if k not in found]
        for part in together([segments[k] for k in missing]):
            numbers = [missing[k] for k in part]
            results = self.decode_batch([segments[k] for k in numbers], "base")
            found |= {k: replace(segments[k], base=result) for k, result in zip(numbers, results, strict=True)}
        return [found[k] for k in range(len(segments))]

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
                what the base heard, by which methods without an in-domain score are judged.
            progress: called after each segment with the share that is done, 0 to 1. An error that
                it raises ends the work.
            heard: called after each segment with all words so far.

        Raises:
            ModelError: the model has no such method or accent.
        """
        self.check_method(method)

        def each() -> Iterator[Heard]:
            began = time.perf_counter()
            for segment in self.segments(audio) if encoded is None else encoded:
                encoding = time.perf_counter() - began if encoded is None else 0.0
                (one,) = self._hear([segment], method, accent, intervention)
                yield replace(one, seconds=one.seconds + encoding)
                began = time.perf_counter()

        count = len(encoded) if isinstance(encoded, list) else None
        return self._transcript(audio, method, each(), count, want_trace=want_trace, progress=progress, heard=heard)

    def transcribe_all(
        self, audios: Sequence[Audio | np.ndarray], method: str = "hdmole", accent: str = "auto"
    ) -> list[Transcript]:
        """Transcribe several recordings, in less time than one after the other.

        The decoder writes the words of several segments at once. Most of its time it reads its
        weights from memory, and it then reads them once for all. The time of a segment is its
        share of the time of those with which it was decoded.

        Args:
            audios: each is decoded audio, or samples (S,) at 16 kHz.
            method: one of `methods`.
            accent: "auto", or the name of an accent to route by.

        Raises:
            ModelError: the model has no such method or accent.
        """
        self.check_method(method)
        recordings, times = [], [time.perf_counter()]
        for audio in audios:
            recordings.append(self.segment(audio))
            times.append(time.perf_counter())
        segments = list(chain.from_iterable(recordings))
        if self.judge(method) == "base" != method:
            segments = self.ask_base(segments)
        found: dict[int, Heard] = {}
        for part in together(segments):
            found.update(zip(part, self._hear([segments[k] for k in part], method, accent), strict=True))
        each = iter(found[k] for k in range(len(segments)))
        return [
            self._transcript(audio, method, islice(each, len(recording)), len(recording), encoding=end - start)
            for audio, recording, (start, end) in zip(audios, recordings, pairwise(times), strict=True)
        ]

    def _hear(self, segments: list[Encoded], method: str, accent: str, intervention: dict[str, Any] | None = None) -> list[Heard]:
        """What a method hears in segments, and how it is routed there."""
        began, model = time.perf_counter(), self.models[method]
        recorded: list[Trace | None] = [None] * len(segments)
        if method not in self.routed:
            results = self.decode_batch(segments, method, accent)
        else:
            results = []
            with intervene(model, **intervention) if intervention else nullcontext():
                if len(segments) > 1 and self._routes_encoder_alone(method):
                    posteriors = [self.posterior_of(segment, accent, method)[None] for segment in segments]
                    states = []
                    for k, segment in enumerate(segments):
                        with self._tracing(segment, method) as recorded[k]:
                            states += self._states([segment], method, posteriors[k])
                    results = self._decoded(segments, method, states, torch.cat(posteriors))
                else:
                    for k, segment in enumerate(segments):
                        with self._tracing(segment, method) as recorded[k]:
                            results += self.decode_batch([segment], method, accent)
        seconds = (time.perf_counter() - began) / len(segments)
        found = []
        for segment, result, one in zip(segments, results, recorded, strict=True):
            known = replace(segment, base=result) if method == "base" else segment
            words, timing = self._words(segment, result)
            found.append(Heard(known, result, words, timing, self.ctc_text(segment), one, seconds))
        return found

    def _routes_encoder_alone(self, method: str) -> bool:
        """Whether all HDMoLE layers of a method lie in its encoder, so that decoding is not routed."""
        encoder = self.models[method].get_base_model().speech_encoder
        return set(layers_of(self.models[method])) <= {id(module) for module in encoder.modules()}

    def _tracing(self, segment: Encoded, method: str) -> AbstractContextManager[Trace]:
        """Records the routing of a segment, without the silence added after it."""
        frames = self.frames(segment)
        sounding = slice(0, frames) if frames < len(segment.states) else None
        return trace(self.models[method], frames=sounding, seconds_per_frame=self.seconds_per_frame)

    def _transcript(
        self,
        audio: Audio | np.ndarray,
        method: str,
        coming: Iterable[Heard],
        count: int | None,
        *,
        encoding: float = 0.0,
        want_trace: bool = False,
        progress: Callable[[float], None] | None = None,
        heard: Callable[[list[Word]], None] | None = None,
    ) -> Transcript:
        """The transcript of a recording from its segments, `count` in all if that is known.

        `encoding` are seconds beside those of the segments.
        """
        seconds = len(samples_of(audio)) / SAMPLE_RATE
        parts: list[Heard] = []
        for found in coming:
            known = self.ask_base([found.segment]) if self.judge(method) == "base" else [found.segment]
            parts.append(replace(found, segment=known[0]))
            if heard:
                heard([word for part in parts for word in part.words])
            if progress:
                progress(len(parts) / count if count else min(1.0, found.segment.until / seconds))
        in_domain = self.in_domain([part.segment for part in parts], method, [part.result for part in parts])
        return joined(parts, method, self.accents, in_domain, seconds, encoding=encoding, want_trace=want_trace)

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
        posterior = self.posterior_of(segment, accent, method)[None]

        def scores() -> list[float]:
            """The log-probability of each word."""
            (states,) = self._states([segment], method, posterior)
            return word_log_probs(model, states, result.ids, posterior, self.tokenizer)

        before, after = scores(), []
        for change in changes:
            with intervene(model, **change):
                after.append(scores())
        return [
            {"word": w.word, "start": w.start, "end": w.end, "before": before[k], "after": [found[k] for found in after]}
            for k, w in enumerate(self._words(segment, result)[0])
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

    def judge(self, method: str) -> str | None:
        """The method by whose transcripts the in-domain score judges audio that `method` hears.

        It is the method itself or, where that has no score, the frozen base; None if neither has.
        """
        return next((name for name in (method, "base") if name in self.domain), None)

    def in_domain(
        self, segments: Sequence[Encoded], method: str = "base", heard: Sequence[Decoded] | None = None
    ) -> dict[str, Any]:
        """Whether the audio is of the kind that the model was made for.

        Args:
            segments: the segments of a recording.
            method: the method whose transcript is judged, as `judge` says.
            heard: what the method heard in each segment, so that it is not asked again.

        Returns:
            `score` from 0 to 1, `verdict` (true: in domain) and `reasons` in words. For several
            segments also `outside`, the spans in seconds of the segments that are out of domain.
            Score and verdict are None if the model has no such score, and somebody speaks.
        """
        if not any(segment.spoken for segment in segments):
            return {"score": 0.0 if self.domain else None, "verdict": False, "reasons": [UNSPOKEN]}
        judge = self.judge(method)
        if judge is None:
            return {"score": None, "verdict": None, "reasons": ["this model has no in-domain score"]}
        if judge == "base":
            heard = [segment.base for segment in self.ask_base(segments) if segment.base]
        elif heard is None:
            heard = self.decode_batch(list(segments), judge)
        found = [self._scored(self.domain[judge], *part) for part in zip(segments, heard, strict=True)]
        spans = [(segment.offset, segment.offset + segment.seconds) for segment in segments]
        return found[0] if len(found) == 1 else verdict_of_all(found, spans)

    def _scored(self, domain: DomainScorer, segment: Encoded, heard: Decoded) -> dict[str, Any]:
        """The score of one segment; without a word it is out of domain."""
        if heard.text:
            return domain.score(self.domain_features(segment, heard))
        return {"score": 0.0, "verdict": False, "reasons": [PHRASES["empty"] if segment.spoken else UNSPOKEN]}

    def domain_features(self, segment: Encoded, heard: Decoded) -> dict[str, float]:
        """The features of the in-domain score, by name, of what a method heard in a segment."""
        posterior = segment.posterior.cpu().numpy()
        if segment.ctc is None or self.blank is None:
            english = 1.0 if heard.english is None else heard.english
            return decoder_features(segment.samples, heard.text, heard.log_probs, posterior, english)
        tokens, _ = word_tokens(heard.ids, self.tokenizer)
        aligned = align(segment.ctc, [heard.ids[k] for k in tokens], self.blank)
        return domain_features(
            samples=segment.samples,
            ctc_log_probs=segment.ctc.cpu().numpy(),
            ctc_text=self.ctc_text(segment),
            text=heard.text,
            token_log_probs=heard.log_probs,
            alignment_score=aligned[1] if aligned else None,
            posterior=posterior,
            blank=self.blank,
        )
