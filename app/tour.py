"""The guided tour of five steps, and the presentation mode."""

from __future__ import annotations

import streamlit as st

from app.session import session
from app.texts import Text, t

STEPS = [
    ("transcribe", Text("Hear an accent"), Text("The same utterance by the frozen base and its adaptations: read what each makes of the words.")),
    ("routing", Text("See which expert worked"), Text("Each row is an expert, each column a moment: the brighter, the more weight; empty cells were under their threshold.")),
    ("thresholds", Text("Move a threshold"), Text("Raise a threshold until experts fall silent, and read what happens to the words.")),
    ("correspondence", Text("Does each expert serve its accent?"), Text("Over a whole test corpus: the global router is told the accent; what did the local one learn?")),
    ("compare", Text("Is it better, and how sure are we?"), Text("Against LoRA and full fine-tuning, on the same speech, with intervals.")),
]  # fmt: skip
LEAVE = Text("The button at the upper right leaves it.")
_PRESENT = """<style>
html { font-size: 118%; }
[data-testid="stSidebar"], [data-testid="stExpandSidebarButton"], .modebar-container, [data-testid="stTextInput"],
[data-testid="stFileUploader"], [data-testid="stDownloadButton"], [data-testid="stPopover"] { display: none !important; }
.st-key-present_off { position: fixed; right: 1rem; top: .6rem; width: auto; z-index: 1000000; }
[data-testid="stHeader"] { padding-right: 13rem; }
.stMainBlockContainer { max-width: 1500px; margin: 0 auto; padding-top: 4.4rem; }
</style>"""


def go(step: int) -> None:
    """Open a step of the tour."""
    session().tour = step
    st.switch_page(f"../pages/{STEPS[step][0]}.py")


def bar() -> None:
    """Show the present step of the tour, with buttons to go on, back or out."""
    step = session().tour
    if step is None:
        return
    _, title, text = STEPS[step]
    with st.container(border=True, key="tour"):
        words, back, on, leave = st.columns([6, 1, 1, 1], vertical_alignment="center")
        words.markdown(t("**{step} of {steps}: {title}** – {text}", step=step + 1, steps=len(STEPS), title=title, text=text))
        if back.button(t("Back"), key="tour_back", disabled=step == 0, width="stretch"):
            go(step - 1)
        if step + 1 < len(STEPS) and on.button(t("Next"), key="tour_next", type="primary", width="stretch"):
            go(step + 1)
        if leave.button(t("End" if step + 1 < len(STEPS) else "Done"), key="tour_leave", width="stretch"):
            session().tour = None
            st.rerun()


def presentation() -> None:
    """Show the switch of the presentation mode, and while it is on, the button that leaves it."""

    def off() -> None:
        st.session_state.present = False

    with st.sidebar:
        text = t("Large type, the pages on top, and no buttons for files. {leave}", leave=LEAVE)
        st.toggle(t("Presentation mode"), key="present", help=text, persist_state="session")
    if st.session_state.get("present"):
        st.html(_PRESENT)
        st.button(t("Leave presentation mode"), key="present_off", on_click=off)
