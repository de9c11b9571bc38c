"""Choosing the utterance that the pages show, and a stretch of it if it is long.

An utterance is a sample, a file or a recording by microphone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import clips as clips_kept
from app import links, results, texts
from app.access import plain
from app.jobs import LONGEST, Job, Utterance
from app.model import REAL, SMALL
from app.session import session
from app.texts import Text, t
from hdmole.names import GENERAL
from hdmole.settings import settings
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.manifest import manifest_rows
from hdmole.study.results import Results

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR
    from hdmole.speech.decoding import Word
    from hdmole.speech.transcript import Transcript

_NO_MICROPHONE = {
    "denied": Text(
        "The browser does not let this page use the microphone. Allow it by the sign beside the address and load the page again, or "
        "upload a recording."
    ),
    "insecure": Text(
        "Browsers give the microphone only to pages on this machine or by https. Open the app there, or upload a recording."
    ),
    "none": Text("The browser finds no microphone. Plug one in, or upload a recording."),
}
_LOOK_FOR_MICROPHONE = """<script>
(async () => {
  const show = why => document.querySelectorAll(".mic").forEach(note => { note.hidden = note.dataset.why !== why; });
  if (!navigator.mediaDevices) return show("insecure");
  const look = async () => {
    const given = await navigator.permissions.query({ name: "microphone" }).catch(() => null);
    const devices = await navigator.mediaDevices.enumerateDevices();
    show(given?.state === "denied" ? "denied" : devices.some(device => device.kind === "audioinput") ? "" : "none");
    if (given) given.onchange = look;
  };
  await look();
})();
</script>"""
_LONGEST_SAID = 500  # letters of a typed reference that an address holds
UPLOADS = [
    "wav",
    "wave",
    "bwf",
    "rf64",
    "w64",
    "flac",
    "mp3",
    "ogg",
    "oga",
    "ogv",
    "ogx",
    "opus",
    "spx",
    "m4a",
    "m4b",
    "m4r",
    "m4v",
    "mp4",
    "mov",
    "qt",
    "3gp",
    "3gpp",
    "3g2",
    "webm",
    "weba",
    "mkv",
    "mka",
    "aac",
    "adts",
    "amr",
    "awb",
    "caf",
    "aif",
    "aiff",
    "aifc",
    "au",
    "snd",
    "sph",
    "nist",
]

REASONS = {  # for choosing a sample, by `Sample.because`
    "better": Text("HDMoLE makes fewer errors here than the frozen base: {mine} against {theirs}"),
    "worse": Text("HDMoLE makes more errors here than the frozen base: {mine} against {theirs}"),
    "everywhere": Text(
        "this sentence is spoken in all accents, and in {count} of {all} HDMoLE makes more or fewer errors than the frozen base"
    ),
}


# -- the model's samples ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A clip that comes with the model.

    One that is `borrowed` comes with the small model, and is synthetic.

    `because` says why it was chosen, and `heard` what each method makes of it
    (`hdmole.demo.samples`); both may be empty.
    """

    name: str
    path: Path
    text: str
    accent: str
    speaker: str
    because: str = ""
    borrowed: bool = False
    heard: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """Its accent, in the visitor's language, and its first words."""
        words = self.text.split()
        text = " ".join(words[:9]) + (" …" if len(words) > 9 else "")
        accent = texts.accent(self.accent)
        return f"{t('{accent}, synthetic', accent=accent) if self.borrowed else accent} · {text}"

    def utterance(self) -> Utterance:
        """The sample as an utterance to transcribe."""
        return Utterance(self.path.name, self.path.read_bytes(), self.text, self.accent, self.name)


def sample_manifest(folder: Path) -> Path:
    """The manifest of a model's samples. The model for real people has those of the small model."""
    manifest = folder / "samples" / "manifest.jsonl"
    if session().model == REAL and not manifest.is_file():
        from hdmole.speech.loading import find_model  # slow to import; by now a model is loaded

        return find_model(SMALL) / "samples" / "manifest.jsonl"
    return manifest


def samples(folder: Path) -> list[Sample]:
    """The clips of `sample_manifest`, by accent, general last."""
    manifest = sample_manifest(folder)
    return _samples(manifest, manifest.parent.parent != folder) if manifest.is_file() else []


@st.cache_data(show_spinner=False)
def _samples(manifest: Path, borrowed: bool) -> list[Sample]:
    clips = [
        Sample(
            name=Path(row["audio"]).stem,
            path=manifest.parent / row["audio"],
            text=row["text"],
            accent=row.get("accent", ""),
            speaker=row.get("speaker", ""),
            because=row.get("because", ""),
            borrowed=borrowed,
            heard=row.get("heard", {}),
        )
        for _, row in manifest_rows(manifest, ("audio", "text"))
    ]
    return sorted(clips, key=lambda clip: (clip.accent == GENERAL, clip.accent, clip.name))


def opening_sample(clips: list[Sample], summary: Results | None) -> Sample:
    """The clip on which HDMoLE improves most on the base, by the results of the model it comes
    with.

    A clip on which some methods differ goes before one on which none does. Without results it is
    the first.
    """
    errors = {clip.name: summary.samples.get(clip.name, {}) if summary else {} for clip in clips}

    def seen(clip: Sample) -> tuple[bool, int]:
        found = errors[clip.name]
        return len(set(found.values())) > 1, found.get("base", 0) - found.get("hdmole", 0)

    return max(clips, key=seen)


def sample_results(clips: list[Sample]) -> Results | None:
    """The results of the model that these clips come with; None if it has none."""
    return results.summary_of(clips[0].path.parent.parent / "results") if clips else None


def chosen_because(sample: Sample, clips: list[Sample]) -> str:
    """Why a sample was chosen, with the errors that the results of its model count; empty if that
    is not known.
    """
    summary = sample_results(clips)
    errors = summary.samples if summary else {}
    found = errors.get(sample.name, {})
    if sample.because not in REASONS or not {"base", "hdmole"} <= set(found):
        return ""
    alike = [errors.get(clip.name, {}) for clip in clips if clip.text == sample.text and clip.because == sample.because]
    reason = t(
        REASONS[sample.because], mine=found["hdmole"], theirs=found["base"], all=len(alike),
        count=sum(each.get("hdmole") != each.get("base") for each in alike),
    )  # fmt: skip
    return t("**Chosen because** {reason}{model}.", reason=reason, model=t(" (by the small model)") if sample.borrowed else "")


# -- choosing --------------------------------------------------------------------------------------


def choose(chosen: Utterance) -> None:
    """Make this the utterance that the pages show, and cancel running work on others."""
    kept = session()
    old, kept.utterance = kept.utterance, chosen
    if old is not None and old.key == chosen.key:
        return
    kept.notes.clear()
    for job in kept.jobs.values():
        if job.utterance.key != chosen.key:
            job.cancel()


def choose_sample(sample: Sample) -> None:
    """Make a sample the utterance that the pages show, or say that its file is missing."""
    if not sample.path.is_file():
        st.error(t("The sample {name} is missing from the model's folder; choose another one.", name=sample.name))
        return
    choose(sample.utterance())


def choose_linked(clips: list[Sample]) -> None:
    """Choose the sample or recording that the opened address names.

    If there is none, it is `opening_sample`, by the results of the model that the clips come with.
    """
    kept = session()
    names = {clip.name: clip for clip in clips}
    wanted, key, said = (links.take(name) for name in ("sample", "clip", "said"))
    recording = clips_kept.find(key) if key else None
    if recording is not None:
        choose(recording)
        st.session_state.way = "Upload"
    elif wanted in names:
        choose_sample(names[wanted])
        st.session_state.way = "Sample"
    lost = wanted and wanted not in names
    if clips and (lost or kept.utterance is None):
        choose_sample(opening_sample(clips, sample_results(clips)))
    if lost:
        kept.notes.append(
            t("This link names the sample {name}, which this model does not have; here is another one.", name=plain(repr(wanted)))
        )
    if key and recording is None:
        kept.notes.append(
            t(
                "The recording of this link is not kept any more. Give it again: a recording is kept for an hour after its last use."
            )
        )
    if said and kept.utterance is not None:
        st.session_state[f"reference-{kept.utterance.key}"] = said


def address(chosen: Utterance) -> dict[str, str]:
    """What the address of a page says of an utterance: which one it is, and what was said if the
    visitor typed it.
    """
    said = reference_of(chosen)
    return {"sample": chosen.sample, "clip": chosen.clip, "said": said[:_LONGEST_SAID] if said != chosen.reference else ""}


def sample_select(clips: list[Sample], label: str = "") -> None:
    """Show a list of the model's samples. The chosen one becomes the session's utterance."""
    by_name = {clip.name: clip for clip in clips}
    current = session().utterance
    name = current.sample if current is not None and current.sample in by_name else None
    st.session_state.sample_choice = name

    def chosen() -> None:
        # right after a change of language it holds the old label
        if st.session_state.sample_choice in by_name:
            choose_sample(by_name[st.session_state.sample_choice])
            links.reset()

    st.selectbox(
        label or t("Sample"), list(by_name), key="sample_choice", on_change=chosen, format_func=lambda n: by_name[n].label,
        placeholder=t("{name} (yours)", name=current.name) if current is not None else t("Choose a sample"),
        label_visibility="visible" if label else "collapsed",
    )  # fmt: skip


def choose_utterance(clips: list[Sample]) -> None:
    """Show the three ways to give an utterance: a sample, a file, the microphone."""

    def take(key: str, name: str) -> None:
        file = st.session_state[key]
        if file is not None:
            choose(clips_kept.keep(Utterance(name or file.name, file.getvalue())))
            links.reset()

    ways = [*([Text("Sample")] if clips else []), Text("Upload"), Text("Microphone")]
    left, right = st.columns([1, 2], vertical_alignment="top")
    with left:
        way = st.segmented_control(
            t("Speech from"),
            ways,
            default=ways[0],
            required=True,
            key="way",
            format_func=t,
            persist_state="session",
            label_visibility="collapsed",
        )
    with right:
        if way == "Sample":
            sample_select(clips)
            current = session().utterance
            name = current.sample if current is not None else ""
            if why := next((chosen_because(clip, clips) for clip in clips if clip.name == name), ""):
                st.caption(why)
            if any(clip.borrowed for clip in clips):
                st.caption(t("These samples are synthetic voices. This model is for people: record yourself or upload a file."))
        elif way == "Upload":
            st.file_uploader(
                t("Audio file, up to {minutes} minutes and {size} MB", minutes=f"{LONGEST / 60:g}", size=settings().upload_mb),
                type=UPLOADS, key="upload", on_change=take, args=("upload", ""), max_upload_size=settings().upload_mb,
                help=t(
                    "It stays in this computer's memory for an hour after it was last used. The address of this page opens it, also "
                    "for others who have the address."
                ),
            )  # fmt: skip
            shown = session().utterance
            if st.session_state.upload is None and shown is not None and shown.clip:
                st.caption(t("Now shown: {name}", name=plain(shown.name)))
        else:
            st.audio_input(t("Record a sentence"), key="recording", on_change=take, args=("recording", "recording.wav"))
            notes = "".join(
                f"<p class='mic' data-why='{why}' hidden>{escape(t(text))}</p>" for why, text in _NO_MICROPHONE.items()
            )
            st.html(notes + _LOOK_FOR_MICROPHONE, unsafe_allow_javascript=True)


def chosen_utterance() -> Utterance:
    """The session's utterance. If there is none, the page ends with a sentence that says so."""
    chosen = session().utterance
    if chosen is None:
        st.info(t("Choose, upload or record an utterance first."))
        st.page_link("../pages/transcribe.py", label=t("To the page Transcribe"), icon=":material/graphic_eq:")
        st.stop()
    return chosen


def routed_utterance(asr: ASR) -> Utterance:
    """The session's utterance on a page about routing. Without a routed model the page ends."""
    chosen = chosen_utterance()
    if not asr.routed:
        st.info(t("This model has no HDMoLE adapter, so there is no routing to show or change."))
        st.stop()
    return chosen


def reference_input(chosen: Utterance) -> str:
    """Show a field for the text that was really said, and return what it holds."""
    key = f"reference-{chosen.key}"
    if key not in st.session_state:
        st.session_state[key] = chosen.reference
    return st.text_input(
        t("What was said (optional, for the word error rate)"),
        key=key,
        persist_state="session",
        placeholder=t("Type the words that were said"),
    )


def reference_of(chosen: Utterance) -> str:
    """What was really said, on a page that does not ask for it."""
    return str(st.session_state.get(f"reference-{chosen.key}", chosen.reference))


# -- stretches of a long recording -----------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """One of the stretches that a long recording was cut into.

    `start` and `end` are in seconds; `samples` are (S,) at 16 kHz.
    """

    number: int
    start: float
    end: float
    words: list[Word]
    samples: np.ndarray


def overview(job: Job) -> None:
    """Of a long recording, what each method heard in each stretch.

    A chosen row is the stretch that the pages show.
    """
    if len(job.segments) < 2 or not job.transcripts:
        return

    def chosen() -> None:
        if rows := st.session_state[key].selection.rows:
            st.session_state[f"stretch-{job.utterance.key}"] = rows[0]

    key = f"overview-{job.utterance.key}"
    table = [
        {"stretch": f"{clock(start)}–{clock(end)}"}
        | {
            method: " ".join(word.word for word in heard.words if start <= word.start < end)
            for method, heard in job.transcripts.items()
        }
        for start, end in job.segments
    ]
    names = {"stretch": t("stretch")} | {method: texts.method(method) for method in job.transcripts}
    st.header(t("Stretch by stretch"))
    st.dataframe(table, hide_index=True, height=260, on_select=chosen, selection_mode="single-row", key=key, column_config=names)
    st.caption(t("**How to read this:** choose a row to see that stretch below and on the other pages."))


def choose_stretch(job: Job, transcript: Transcript | None) -> Stretch:
    """The stretch of a long recording that the visitor chose; a short recording as a whole."""
    assert job.audio is not None
    spans = job.segments or [(0.0, job.audio.seconds)]
    words = transcript.words if transcript else []

    def said(k: int) -> str:
        inside = " ".join(w.word for w in words if spans[k][0] <= w.start < spans[k][1])
        text = f"{inside[:60]}{'…' if len(inside) > 60 else ''}"
        return t("{start} to {end}: {words}", start=clock(spans[k][0]), end=clock(spans[k][1]), words=text)

    number = 0
    if len(spans) > 1:
        number = st.selectbox(
            t("Stretch of {length}", length=clock(job.audio.seconds)), range(len(spans)), format_func=said,
            key=f"stretch-{job.utterance.key}", persist_state="session",
        )  # fmt: skip
    start, end = spans[number]
    inside = [w for w in words if start <= w.start < end]
    return Stretch(number, start, end, inside, job.audio.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)])


def clock(seconds: float) -> str:
    """Minutes and seconds: 1:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
