"""Synthetic speech for the demo corpus by espeak-ng: nine accents, many speakers, noise and rooms.

Native accents are espeak-ng's own voices. Foreign accents are rules in a voice file in `voices/`.
The file takes the English phoneme table and replaces phonemes by those that speakers of the other
language tend to say. These accents are caricatures, so their labels say "rule-based".
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import espeakng_loader
import numpy as np
import soxr
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

from hdmole.names import GENERAL
from hdmole.speech.audio import SAMPLE_RATE

VOICES = Path(__file__).with_name("voices")


@dataclass(frozen=True)
class Accent:
    """One accent of the demo.

    Args:
        name: the name in corpora and results.
        label: the name that is shown.
        kind: general, native or foreign.
        voice: the espeak-ng voice.
        rules: how it differs from the general accent.
    """

    name: str
    label: str
    kind: str
    voice: str
    rules: str


ACCENTS: dict[str, Accent] = {
    a.name: a
    for a in (
        Accent(GENERAL, "General American (espeak-ng en-us)", "general", "en-us", "espeak-ng's own voice"),
        Accent("british", "British, received pronunciation", "native", "en-gb-x-rp", "espeak-ng's own voice"),
        Accent("scottish", "Scottish", "native", "en-gb-scotland", "espeak-ng's own voice"),
        Accent("caribbean", "Caribbean", "native", "en-029", "espeak-ng's own voice"),
        Accent("indian", "Indian (rule-based)", "foreign", "en-IN", "retroflex t d, dental th, w as v, z as s, monophthongs"),
        Accent("german", "German (rule-based)", "foreign", "en-DE", "th as s z, w as v, final devoicing, uvular r"),
        Accent("spanish", "Spanish (rule-based)", "foreign", "en-ES", "v as b, z as s, sh as ch, tense vowels, th as t d"),
        Accent("french", "French (rule-based)", "foreign", "en-FR", "h dropped, th as s z, uvular r, tense vowels"),
        Accent("mandarin", "Mandarin (rule-based)", "foreign", "en-CN", "final stops dropped or devoiced, v as w, th as s z"),
    )
}

# Accents without an expert. No model is trained on them.
UNSEEN: dict[str, Accent] = {
    a.name: a
    for a in (
        Accent("lancaster", "Lancaster", "native", "en-gb-x-gbclan", "espeak-ng's own voice"),
        Accent("midlands", "West Midlands", "native", "en-gb-x-gbcwmd", "espeak-ng's own voice"),
        Accent("new_york", "New York City", "native", "en-us-nyc", "espeak-ng's own voice"),
    )
}

# Groups of similar phonemes, in the symbols of espeak-ng.
_EXCHANGED = (
    "p t k",
    "b d g",
    "f s S T",
    "v z D",
    "l r w",
    "I E a V",
    "i: eI u: oU",
)


def _conflicting(count: int) -> dict[str, Accent]:
    """Invented accents. In each, two randomly drawn phonemes of every group are exchanged.

    A sound therefore stands for different phonemes in different accents.
    """
    found = {}
    for k in range(1, count + 1):
        rng = np.random.default_rng([12, k])
        pairs = [rng.permutation(group.split())[:2] for group in _EXCHANGED]
        rules = ", ".join(f"{one} as {other}, {other} as {one}" for one, other in pairs)
        found[f"exchange_{k}"] = Accent(f"exchange_{k}", f"Exchanged phonemes {k}", "foreign", f"en-X{k}", rules)
    return found


# Nobody speaks these accents. They serve to study when routing helps: where accents agree, one
# adapter for all of them is enough.
CONFLICTING: dict[str, Accent] = _conflicting(12)
EVERY: dict[str, Accent] = {**ACCENTS, **UNSEEN, **CONFLICTING}


def _voice_file(accent: Accent) -> str:
    """The espeak-ng voice file of an accent in `CONFLICTING`."""
    rules = [rule.split(" as ") for rule in accent.rules.split(", ")]
    head = f"name English ({accent.label})\nlanguage {accent.voice.lower()}\nlanguage en 9\n\nphonemes en-us\ndictrules 3 6\n\n"
    return head + "".join(f"replace 00 {one} {other}\n" for one, other in rules)


_NOVELTY = [
    "whisper",
    "whisperf",
    "croak",
    "fast",
    "UniRobot",
    "anikaRobot",
    "Demonic",
    "Tweaky",
    "Storm",
    "kaukovalta",
    "AnxiousAndy",
    "announcer",
    "serious",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "klatt5",
    "klatt6",
    "RicishayMax",
    "RicishayMax2",
    "RicishayMax3",
]

_OTHER_LANGUAGES: dict[str, list[str]] = {
    "de": ["Guten Morgen, wie geht es Ihnen heute?", "Der Zug nach Berlin fährt um acht Uhr ab.", "Ich möchte bitte ein Glas Wasser.",
           "Morgen soll es den ganzen Tag regnen.", "Wo ist der nächste Bahnhof?", "Meine Schwester wohnt in einem alten Haus."],
    "fr": ["Bonjour, comment allez-vous aujourd'hui ?", "Le train pour Lyon part à huit heures.", "Je voudrais un verre d'eau, s'il vous plaît.",
           "Il va pleuvoir toute la journée demain.", "Où se trouve la gare la plus proche ?", "Ma sœur habite une vieille maison."],
    "es": ["Buenos días, ¿cómo está usted hoy?", "El tren a Sevilla sale a las ocho.", "Quisiera un vaso de agua, por favor.",
           "Mañana va a llover todo el día.", "¿Dónde está la estación más cercana?", "Mi hermana vive en una casa antigua."],
    "it": ["Buongiorno, come sta oggi?", "Il treno per Roma parte alle otto.", "Vorrei un bicchiere d'acqua, per favore.",
           "Domani pioverà tutto il giorno.", "Dov'è la stazione più vicina?", "Mia sorella abita in una vecchia casa."],
    "pl": ["Dzień dobry, jak się pan dzisiaj miewa?", "Pociąg do Krakowa odjeżdża o ósmej.", "Poproszę szklankę wody.",
           "Jutro będzie padać przez cały dzień.", "Gdzie jest najbliższy dworzec?", "Moja siostra mieszka w starym domu."],
    "ru": ["Доброе утро, как у вас дела?", "Поезд в Москву отправляется в восемь часов.", "Дайте, пожалуйста, стакан воды.",
           "Завтра весь день будет дождь.", "Где ближайший вокзал?", "Моя сестра живёт в старом доме."],
    "hi": ["नमस्ते, आप आज कैसे हैं?", "दिल्ली की ट्रेन आठ बजे जाती है।", "मुझे एक गिलास पानी चाहिए।", "कल पूरे दिन बारिश होगी।",
           "सबसे नज़दीकी स्टेशन कहाँ है?", "मेरी बहन एक पुराने घर में रहती है।"],
    "tr": ["Günaydın, bugün nasılsınız?", "Ankara treni saat sekizde kalkıyor.", "Bir bardak su istiyorum, lütfen.",
           "Yarın bütün gün yağmur yağacak.", "En yakın istasyon nerede?", "Kız kardeşim eski bir evde oturuyor."],
    "pt": ["Bom dia, como está hoje?", "O comboio para Lisboa parte às oito.", "Queria um copo de água, por favor.",
           "Amanhã vai chover o dia todo.", "Onde fica a estação mais próxima?", "A minha irmã mora numa casa antiga."],
    "sv": ["God morgon, hur mår du idag?", "Tåget till Stockholm går klockan åtta.", "Jag skulle vilja ha ett glas vatten.",
           "I morgon ska det regna hela dagen.", "Var ligger närmaste station?", "Min syster bor i ett gammalt hus."],
}  # fmt: skip


@dataclass(frozen=True)
class Speaker:
    """A synthetic speaker.

    Args:
        name: the name in corpora and results.
        variant: the espeak-ng voice variant.
        pitch: espeak-ng's pitch, 0 to 99.
        rate: words per minute.
        pitch_range: espeak-ng's pitch range.
        vocal_tract: factor by which resampling raises all frequencies.
    """

    name: str
    variant: str
    pitch: int
    rate: int
    pitch_range: int
    vocal_tract: float


def _variants() -> list[str]:
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and " " not in p.name)
    return [n for n in names if n not in _NOVELTY and not n.startswith("robosoft")]


def speakers(split: str, count: int, seed: int) -> list[Speaker]:
    """`count` speakers of a split. No voice variant is in two splits.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"There is no split {split!r}; the splits are train, dev and test.")
    names = list(np.random.default_rng(20_240_919).permutation(_variants()))
    parts = {"test": names[:12], "dev": names[12:20], "train": names[20:]}
    rng = np.random.default_rng([seed, len(split)])
    people = []
    for i in range(count):
        variant = str(parts[split][i % len(parts[split])])
        people.append(
            Speaker(f"{split}-{variant}-{i}", variant, int(rng.integers(25, 76)), int(rng.integers(140, 201)),
                    int(rng.integers(30, 75)), round(float(rng.uniform(0.9, 1.12)), 3))
        )  # fmt: skip
    return people


def say_again(text: str, accent: str, speaker: str, seed: int = 0) -> np.ndarray | None:
    """Make a synthetic test utterance again from its text, accent and speaker.

    Test speech is not kept. The length can differ from that of the first time by milliseconds,
    because espeak-ng's output depends a little on what it said before.

    Returns:
        Samples (float32, mono, 16 kHz, peak 0.5), or None if the accent or the speaker is unknown.
    """
    person = next((p for p in speakers("test", 12, seed) if p.name == speaker), None)
    if person is None or accent not in EVERY:
        return None
    with Synthesiser() as synthesiser:
        return synthesiser.say_language(text, EVERY[accent].voice, person)


def other_language_sentences() -> list[tuple[str, str]]:
    """Pairs (language, sentence) in ten other languages. The languages take turns."""
    longest = max(len(v) for v in _OTHER_LANGUAGES.values())
    return [(lang, texts[k]) for k in range(longest) for lang, texts in _OTHER_LANGUAGES.items() if k < len(texts)]


# espeak-ng has global state, so that a process can have only one synthesiser at a time.
_lock = Lock()
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesiser:
    """espeak-ng with this project's accent voices, as a context manager.

    Raises:
        RuntimeError: espeak-ng does not start, or gives no sound.
    """

    def __enter__(self) -> Synthesiser:
        _lock.acquire()
        self._folder = tempfile.TemporaryDirectory(prefix="hdmole-espeak-")
        data = Path(self._folder.name) / "espeak-ng-data"
        shutil.copytree(espeakng_loader.get_data_path(), data)
        for voice in VOICES.glob("en-*"):
            shutil.copy(voice, data / "lang" / "gmw" / voice.name)
        for accent in CONFLICTING.values():
            (data / "lang" / "gmw" / accent.voice).write_text(_voice_file(accent))
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        # The first argument, 2, asks for synchronous output.
        self._rate = self._library.espeak_Initialize(2, 0, str(data.parent).encode(), 0)
        if self._rate <= 0:
            self.__exit__()
            raise RuntimeError("espeak-ng did not start; reinstall the package espeakng-loader.")
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._library.espeak_Terminate()
        self._folder.cleanup()
        _lock.release()

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, accent: str, speaker: Speaker) -> np.ndarray:
        """Samples (float32, mono, 16 kHz, peak 0.5) of an English text in one of `ACCENTS`.

        Raises:
            ValueError: the accent is unknown.
        """
        if accent not in ACCENTS:
            raise ValueError(f"There is no accent {accent!r}; the accents are {', '.join(ACCENTS)}.")
        return self.say_language(text, ACCENTS[accent].voice, speaker)

    def say_language(self, text: str, language: str, speaker: Speaker) -> np.ndarray:
        """Samples (float32, mono, 16 kHz, peak 0.5) of a text in an espeak-ng voice, such as `de`.

        Raises:
            ValueError: espeak-ng has no such voice.
        """
        voice = f"{language}+{speaker.variant}"
        if voice != self._voice:
            if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise ValueError(f"espeak-ng has no voice {voice!r}.")
            self._voice = voice
        for parameter, value in ((1, speaker.rate), (3, speaker.pitch), (4, speaker.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        encoded = text.encode()
        # The last 1 says that the text is in UTF-8.
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
        if not self._chunks:
            raise RuntimeError(f"espeak-ng gave no sound for {text!r}.")
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        wave = soxr.resample(wave, self._rate * speaker.vocal_tract, SAMPLE_RATE, quality="MQ")
        loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
        margin = SAMPLE_RATE // 10
        wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
        loudest: np.ndarray = (0.5 * wave / np.abs(wave).max()).astype(np.float32)
        return loudest


def coloured_noise(count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """`count` samples of noise with a power spectrum of 1 / f**exponent and standard deviation 1.

    The exponent is 0 for white, 1 for pink and 2 for brown noise.
    """
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.arange(len(spectrum))
    frequency[0] = 1
    noise = np.fft.irfft(spectrum / frequency ** (exponent / 2), count)
    return noise / max(1e-9, float(noise.std()))


def augment(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add at random what microphones, rooms and telephone lines add to speech.

    This is reverberation, noise, band limits, spectral tilt, clipping, and silence at both ends.
    The peak of the result is at most 1.
    """
    wave = np.pad(wave, (int(rng.uniform(0, 0.3) * SAMPLE_RATE), int(rng.uniform(0, 0.3) * SAMPLE_RATE))).astype(np.float64)
    if rng.random() < 0.25:
        return (wave * rng.uniform(0.3, 1.8)).clip(-1, 1).astype(np.float32)
    if rng.random() < 0.4:  # a room
        length = int(SAMPLE_RATE * rng.uniform(0.08, 0.5))
        response = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length) * rng.uniform(0.02, 0.15)
        response[0] = 1
        wave = fftconvolve(wave, response)[: len(wave)]
    if rng.random() < 0.5:  # a microphone's colour
        wave = lfilter([1, -rng.uniform(-0.6, 0.6)], [1], wave)
    band = rng.random()
    if band < 0.25:  # a telephone
        wave = sosfilt(
            butter(4, [rng.uniform(150, 350), rng.uniform(3000, 3800)], "bandpass", fs=SAMPLE_RATE, output="sos"), wave
        )
    elif band < 0.45:  # a poor microphone or codec
        wave = sosfilt(butter(4, rng.uniform(3500, 7000), "lowpass", fs=SAMPLE_RATE, output="sos"), wave)
    if rng.random() < 0.7:
        noise = coloured_noise(len(wave), rng.uniform(0, 2), rng)
        if rng.random() < 0.2:  # mains hum
            noise = noise + 1.5 * np.sin(2 * np.pi * rng.choice([50, 60, 100, 120]) * np.arange(len(wave)) / SAMPLE_RATE)
        level = float(np.sqrt(np.mean(wave**2))) * 10 ** (-rng.uniform(8, 35) / 20)
        wave = wave + noise * level
    wave = wave / max(1e-6, float(np.abs(wave).max()))
    if rng.random() < 0.1:
        wave = np.tanh(rng.uniform(1, 3) * wave)
    return (wave * rng.uniform(0.1, 1.0)).clip(-1, 1).astype(np.float32)


def out_of_domain_noise(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Make sound that is not speech.

    Args:
        kind: silence, noise or music.
        seconds: its length.
        rng: decides how it sounds.

    Returns:
        Samples (float32, mono, 16 kHz).
    """
    count = max(SAMPLE_RATE // 5, int(seconds * SAMPLE_RATE))
    time = np.arange(count) / SAMPLE_RATE
    if kind == "silence":
        return (coloured_noise(count, rng.uniform(0, 2), rng) * 10 ** rng.uniform(-5, -2.7)).astype(np.float32)
    if kind == "noise":
        wave = coloured_noise(count, rng.uniform(0, 2.2), rng)
        style = rng.integers(0, 5)
        if style == 1:  # bursts: rain, steps, typing
            wave = wave * (rng.random(count) < rng.uniform(0.0005, 0.01)).astype(float)
            wave = fftconvolve(wave, np.exp(-np.arange(800) / rng.uniform(20, 300)))[:count]
        elif style == 2:  # an engine
            wave = 0.3 * wave + np.sign(np.sin(2 * np.pi * rng.uniform(25, 180) * time)) * (
                1 + 0.3 * np.sin(2 * np.pi * 3 * time)
            )
        elif style == 3:  # slow swells: wind, traffic
            wave = wave * (0.3 + np.abs(np.sin(2 * np.pi * rng.uniform(0.1, 2) * time + rng.uniform(0, 6))))
        elif style == 4:  # a sweep or an alarm
            wave = 0.1 * wave + np.sin(
                2
                * np.pi
                * np.cumsum(rng.uniform(300, 2500) * (1 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.5, 6) * time)))
                / SAMPLE_RATE
            )
    elif kind == "music":
        wave = _music(count, rng)
    else:
        raise ValueError(f"There is no sound of kind {kind!r}; the kinds are silence, noise and music.")
    return (wave / max(1e-6, float(np.abs(wave).max())) * rng.uniform(0.1, 0.9)).astype(np.float32)


def _music(count: int, rng: np.random.Generator) -> np.ndarray:
    wave = np.zeros(count)
    root = rng.uniform(90, 330)
    scale = np.array([[0, 2, 4, 5, 7, 9, 11, 12], [0, 2, 3, 5, 7, 8, 10, 12]][rng.integers(0, 2)])
    beat = int(SAMPLE_RATE * rng.uniform(0.18, 0.6))
    timbre = rng.integers(0, 3)
    for start in range(0, count, beat):
        length = min(count - start, int(beat * rng.uniform(0.9, 2.5)))
        time = np.arange(length) / SAMPLE_RATE
        for degree in rng.choice(scale, rng.integers(1, 4), replace=False):
            pitch = root * 2 ** ((degree + 12 * rng.integers(0, 2)) / 12)
            if timbre == 0:  # organ or strings: steady harmonics
                tone = sum(np.sin(2 * np.pi * pitch * h * time) / h for h in range(1, 6))
            elif timbre == 1:  # plucked: decaying harmonics
                tone = sum(np.sin(2 * np.pi * pitch * h * time) * np.exp(-time * 3 * h) / h for h in range(1, 7))
            else:  # bells and electric piano: frequency modulation
                tone = np.sin(2 * np.pi * pitch * time + 3 * np.exp(-3 * time) * np.sin(2 * np.pi * 2 * pitch * time))
            wave[start : start + length] += tone * np.minimum(1, time * 60) * np.minimum(1, (length / SAMPLE_RATE - time) * 30)
        if rng.random() < 0.6:  # a drum on the beat
            hit = min(count - start, 2400)
            wave[start : start + hit] += 2 * rng.standard_normal(hit) * np.exp(-np.arange(hit) / rng.uniform(100, 600))
    return wave
