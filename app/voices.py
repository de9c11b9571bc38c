"""One sentence in every accent, to play, with what each method hears of it.

The transcripts come from the samples' manifest, which `hdmole demo samples` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import streamlit as st

from app import texts
from app.access import audio_type, plain
from app.cards import text_html
from app.model import REAL
from app.session import session
from app.texts import t
from app.utterance import Sample, sample_results
from hdmole.figures.utterance import METHOD_COLOURS
from hdmole.speech.words import count_errors, normalise

METHODS = ("base", "lora", "full", "hdmole")
# The players are hidden; the buttons of the table start and stop them.
_PLAY = """<script>
if (!window.voices) {
  const all = selector => [...document.querySelectorAll(selector)];
  const show = () => all(".voices button").forEach((button, k) => {
    const player = all(".st-key-voices audio")[k];
    button.classList.toggle("playing", Boolean(player) && !player.paused && !player.ended);
  });
  window.voices = true;
  document.addEventListener("click", event => {
    const button = event.target.closest(".voices button");
    if (!button) return;
    const players = all(".st-key-voices audio"), chosen = players[all(".voices button").indexOf(button)];
    players.forEach(player => { if (player !== chosen) player.pause(); });
    if (!chosen) return;
    if (!chosen.paused) return chosen.pause();
    chosen.currentTime = 0;
    chosen.play();
  });
  for (const change of ["play", "pause", "ended"]) document.addEventListener(change, show, true);
}
</script>"""


def spoken_alike(clips: Sequence[Sample]) -> list[Sample]:
    """The samples of the sentence that is spoken in all accents, those whose transcripts are known."""
    return [clip for clip in clips if clip.because == "everywhere" and clip.heard]


def heard_by_all(clips: Sequence[Sample]) -> str:
    """A table in HTML: a column is an accent, with a button to play it, and a row is a method.

    A cell has a tick where the method heard every word, and else what it heard, with marks.
    """
    heads = "".join(
        f"<th scope='col'><button type='button' aria-label='{escape(t('Play: {accent}', accent=texts.accent(clip.accent)))}'>"
        f"</button><br>{escape(texts.accent(clip.accent))}</th>"
        for clip in clips
    )
    rows = []
    for method in [name for name in METHODS if all(name in clip.heard for clip in clips)]:
        right = [not count_errors(normalise(clip.text), normalise(clip.heard[method]))[0] for clip in clips]
        cells = "".join(
            f"<td class='right'>✓<span class='words'>{escape(clip.text)}</span></td>"
            if well
            else f"<td>{text_html(clip.heard[method], clip.text)}</td>"
            for clip, well in zip(clips, right, strict=True)
        )
        count = t("{right} of {all} right", right=sum(right), all=len(clips))
        rows.append(
            f"<tr><th scope='row' style='--method: {METHOD_COLOURS.get(method, '#8A8A8A')}'>{escape(texts.method(method))}"
            f"<small>{count}</small></th>{cells}</tr>"
        )
    return f"<div class='voices'><table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def show(clips: list[Sample]) -> None:
    """Show the sentence that is spoken in all accents; nothing if the samples have none."""
    alike = spoken_alike(clips)
    if not alike:
        return
    st.header(t("Hear it: “{text}” in {count} accents", text=plain(alike[0].text), count=len(alike)))
    st.html(heard_by_all(alike) + _PLAY, unsafe_allow_javascript=True)
    with st.container(key="voices"):
        for clip in alike:
            data = clip.path.read_bytes() if clip.path.is_file() else b""
            st.audio(data, format=audio_type(data) or "audio/flac")
    said = t("▶ plays a voice · ✓ every word is right · words in a frame are not what was said.")
    summary = sample_results(clips)
    found = summary.methods if summary else {}
    rates = [
        found[name].domains["accent"].mean_over_accents
        for name in ("base", "hdmole")
        if name in found and "accent" in found[name].domains
    ]
    if len(rates) == 2:
        said += " " + t(
            "The sentence was chosen because HDMoLE and the frozen base differ on it. Over all test speech with accents, HDMoLE gets "
            "{mine} of 100 words wrong and the base {theirs}.",
            mine=f"{rates[1]:.1f}", theirs=f"{rates[0]:.1f}",
        )  # fmt: skip
    if session().model == REAL:
        said = t("Synthetic voices, heard by the small model.") + " " + said
    st.caption(said)
