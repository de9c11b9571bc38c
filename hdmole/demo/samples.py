"""The samples of a released model, chosen from its test speech.

Each accent has two clips by test speakers:

1. A sentence that is the same in all accents, and that the base hears well in the general one. Of
   those sentences of test speech on which HDMoLE and the base differ in the most accents, it is the
   one that shows it best when it is said again. Who says it is the test speaker who said it in test
   speech, if there is one.
2. An utterance of the accent on which HDMoLE and the base differ most. It is one where HDMoLE makes
   fewer errors, and in every third accent one where it makes more.

Clips that the in-domain score warns of are passed over where there is another. The manifest says
what each method hears of a clip (`heard`), and why it was chosen: `because` is "everywhere" for the
first one, and "better" or "worse" for the second. It is missing where HDMoLE and the base make
equally many errors.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import soundfile

from hdmole.demo.synth import ACCENTS, Synthesiser, speakers
from hdmole.demo.text import sentences
from hdmole.names import GENERAL
from hdmole.speech.asr import ASR
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.words import score

WORDS = (5, 11)  # fewest and most words of a sample
TRIES = 8  # clips that are heard before one is taken
SENTENCES = 3  # sentences that are heard in all accents before one is taken
WORSE_EVERY = 3  # in every third accent the second clip is one that HDMoLE hears worse

Errors = dict[str, int]  # by method


@dataclass(frozen=True)
class Clip:
    """Speech of a test speaker, as an audio file, and what methods make of it."""

    text: str
    accent: str
    speaker: str
    sound: bytes
    heard: dict[str, str]  # by method
    errors: Errors
    inside: bool  # whether the model's in-domain score takes it for what the model was made for


def write_samples(
    asr: ASR, rows: pd.DataFrame, folder: Path, seed: int, report: Callable[[str], None] = print
) -> dict[str, Errors]:
    """Choose the clips, and write them with their manifest.

    Args:
        asr: the released model, which hears each clip before it is chosen.
        rows: its utterances of test speech, one row per utterance and method.
        folder: where the clips go.
        seed: random seed of the build, and of the test speakers.
        report: called with each line about the progress.

    Returns:
        Number of word errors by clip and by method.
    """
    folder.mkdir(parents=True, exist_ok=True)
    people = speakers("test", 12, seed)
    by_name = {person.name: person for person in people}
    voices = {accent: people[(2 * k + 1) % len(people)].name for k, accent in enumerate(ACCENTS)}  # of the first clips
    pairs = pairs_of(rows)
    lines, errors = [], {}

    def keep(name: str, clip: Clip, because: str) -> None:
        (folder / f"{name}.flac").write_bytes(clip.sound)
        line = {"audio": f"{name}.flac", "text": clip.text, "accent": clip.accent, "speaker": clip.speaker}
        lines.append(line | ({"because": because} if because else {}) | {"heard": clip.heard})
        errors[name] = clip.errors
        report(f"sample {name}: {because or 'no method differs'}: {clip.text} {clip.errors}")

    with Synthesiser() as synthesiser:

        def say(text: str, accent: str, speaker: str) -> Clip:
            clip = io.BytesIO()
            wave = synthesiser.say(text, accent, by_name[speaker])
            soundfile.write(clip, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            return Clip(text, accent, speaker, clip.getvalue(), *hear(asr, clip.getvalue(), text))

        def say_well(text: str, accent: str) -> Clip:
            """The sentence by who said it in test speech, or else by the accent's own voice."""
            spoken = pairs[(pairs.reference == text) & (pairs.accent == accent)].speaker
            for speaker in dict.fromkeys([*spoken, voices[accent]]):
                clip = say(text, accent, speaker)
                if clip.inside:
                    break
            return clip

        said: dict[str, list[Clip]] = {}
        # where test speech has no sentence of a fitting length, as in a small trial, one is made
        texts = shared_sentences(pairs) or [s for s in sentences(200, seed + 7, "test") if _fits(s)][:1]
        for text in texts:
            general = say_well(text, GENERAL)
            if general.errors["base"] and text != texts[-1]:
                continue
            said[text] = [general, *(say_well(text, accent) for accent in ACCENTS if accent != GENERAL)]
            if len(said) == SENTENCES:
                break
        shared = max(said, key=lambda text: sum(gain(clip.errors) != 0 if clip.inside else -1 for clip in said[text]))
        others = pairs[pairs.reference != shared]
        for k, first in enumerate(said[shared]):
            keep(f"{first.accent}_1", first, "everywhere")
            worse = k % WORSE_EVERY == 0
            # speech made anew is not the same to the millisecond, so that what is heard may differ
            for text, speaker in ranked(others, first.accent, worse)[:TRIES] or [(shared, first.speaker)]:
                second = say(text, first.accent, speaker)
                if second.inside and (gain(second.errors) < 0 if worse else gain(second.errors) > 0):
                    break
            keep(f"{first.accent}_2", second, "better" if gain(second.errors) > 0 else "worse" if gain(second.errors) < 0 else "")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return errors


def hear(asr: ASR, sound: bytes, text: str) -> tuple[dict[str, str], Errors, bool]:
    """What each method hears in an audio file of `text`, its number of word errors, and whether the
    audio is in the model's domain.
    """
    samples = soundfile.read(io.BytesIO(sound), dtype="float32")[0]
    encoded, heard, inside = asr.segment(samples), dict[str, str](), True
    for method in asr.methods:
        transcript = asr.transcribe(samples, method=method, encoded=encoded)
        encoded, heard[method], inside = transcript.encoded, transcript.text, transcript.in_domain["verdict"] is not False
    found = score([text] * len(heard), heard.values())["errors"]
    return heard, {method: int(count) for method, count in zip(heard, found, strict=True)}, inside


def pairs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Utterances of synthetic test speech of a fitting length, with the errors of each method in a
    column.
    """
    spoken = rows[rows.domain.isin(["accent", GENERAL]) & rows.reference.map(_fits)]
    keys = ["utterance", "accent", "speaker", "reference"]
    return spoken.pivot_table(index=keys, columns="method", values="errors", aggfunc="first").reset_index()


def shared_sentences(pairs: pd.DataFrame) -> list[str]:
    """Sentences, those first on which HDMoLE and the base differ in the most utterances, and by the
    most errors.
    """
    by = (pairs.hdmole - pairs.base).abs()
    table = pairs.assign(differs=(by > 0).astype(int), by=by).groupby("reference")[["differs", "by"]].sum()
    return list(table.sort_values(["differs", "by"], ascending=False, kind="stable").index)


def ranked(pairs: pd.DataFrame, accent: str, worse: bool) -> list[tuple[str, str]]:
    """Text and speaker of an accent's utterances, those first on which HDMoLE is most of all
    better, or `worse`.

    Of those with the same difference, the ones with the fewest errors come first.
    """
    own = pairs[pairs.accent == accent]
    gains = (own.base - own.hdmole) * (-1 if worse else 1)
    order = own.assign(gain=-gains, left=own[["base", "hdmole"]].min(axis=1)).sort_values(["gain", "left"], kind="stable")
    return list(zip(order.reference, order.speaker, strict=True))


def gain(errors: Errors) -> int:
    """How many errors fewer HDMoLE makes than the base."""
    return errors["base"] - errors["hdmole"]


def differs(errors: Errors) -> bool:
    """Whether some method makes another number of errors than the base."""
    return any(count != errors["base"] for count in errors.values())


def _fits(text: str) -> bool:
    return WORDS[0] <= len(text.split()) <= WORDS[1]
