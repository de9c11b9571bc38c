"""What a family of speech models is, and the table of families.

A new family is one file in this folder with one class, and one line in `FAMILIES`. The shortest
file to copy is `glm_asr.py`, for a model whose LLM reads audio tokens in a prompt, or `whisper.py`
for an encoder and a decoder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Heard(NamedTuple):
    """What a decoder wrote of one utterance."""

    ids: list[int]  # with the end token
    log_probs: list[float]  # of each id, in nats
    # start and end of each text token in seconds from the beginning of the sound, where they are
    # known
    times: list[tuple[float, float]] | None = None
    english: float | None = None  # probability that English is spoken, where the model tells languages apart


class Family(Protocol):
    """What a model must have so that it can be transcribed with, traced, evaluated and adapted.

    Shapes: features (B, T_mel, n_mels) and encoder states (B, T, d), both with masks that are true
    where there is no padding.
    """

    whole_recordings: bool  # whether it was trained on whole recordings, and not on single sentences
    silent_frames: int  # encoder frames of silence that its extractor adds after a sound
    blank: int | None  # id of the blank of a CTC head that writes the decoder's tokens; None without one
    projector: str | None  # name of the part between encoder and LLM; None without one
    seconds_per_state: float  # between two encoder states
    places: dict[str, str]  # projector, encoder, llm -> regular expression of the layers to adapt

    @classmethod
    def from_pretrained(cls, folder: Path, **kwargs: Any) -> Any:
        """The model in a folder; safetensors only."""

    @classmethod
    def extractor(cls, folder: Path) -> Any:
        """A function from samples (S,) to `input_features` and their `attention_mask`, B = 1."""

    @property
    def seconds_per_frame(self) -> dict[str, float]:
        """Seconds between two frames, by a part of the layer's name; NaN where there are no frames."""

    @property
    def longest_segment(self) -> float:
        """Seconds of the longest sound that is heard as a whole in any case."""

    @property
    def longest_utterance(self) -> float:
        """Seconds of the longest sound that is heard as a whole if CTC head and LLM agree on it."""

    @property
    def speech_encoder(self) -> nn.Module:
        """The part that reads mel features."""

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states and their mask."""

    def encoder_layers(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What an accent recogniser reads (B, T, layers * d), and its mask.

        These are outputs of encoder layers one after the other, or the encoder states alone.
        """

    def decode(self, states: Tensor, mask: Tensor) -> list[Heard]:
        """What is heard in each utterance."""

    def forward(self, *, encoder_states: Tensor, encoder_mask: Tensor, labels: Tensor) -> Any:
        """`loss` and `logits`, of which the last L + 1 belong to the labels (B, L)."""


class Entry(NamedTuple):
    """A family in the table: its name, its file and class, and what was tested with which weights."""

    name: str
    file: str
    kind: str
    tested: str


_TINY = "transcribe, trace, evaluate and compare, with tiny random weights"
# by the `model_type` of config.json
FAMILIES = {
    "speech_llm": Entry("CTC encoder, projector and LLM", "speech_llm", "SpeechLLM", "everything, with the demo model"),
    "whisper": Entry("Whisper", "whisper", "Whisper", "everything, with Whisper base"),
    "glmasr": Entry("GLM-ASR", "glm_asr", "GlmAsr", _TINY),
    "qwen2_audio": Entry("Qwen2-Audio", "qwen2_audio", "Qwen2Audio", _TINY),
    "qwen3_asr": Entry("Qwen3-ASR", "qwen3_asr", "Qwen3ASR", _TINY),
    "voxtral": Entry("Voxtral", "voxtral", "Voxtral", _TINY),
    "granite_speech": Entry("Granite Speech", "granite_speech", "GraniteSpeech", _TINY),
}


def family(model_type: str) -> type[Family]:
    """The class of a family in `FAMILIES`. Only its file is imported."""
    entry = FAMILIES[model_type]
    found: type[Family] = getattr(import_module(f"hdmole.models.{entry.file}"), entry.kind)
    return found
