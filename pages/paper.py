"""The paper and this model: the paper's Tables I to III and Figure 2 beside what our comparison
found.
"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app import links, plots, results
from app.model import REAL, load_model
from app.session import session
from app.texts import Text, t
from hdmole.figures import paper as figures
from hdmole.names import GENERAL
from hdmole.study import paper
from hdmole.study.results import Results

TABLES = {"I": Text("I: methods"), "II": Text("II: accent recogniser"), "III": Text("III: rank of an expert")}
BASES = {"base": Text("the frozen base"), "full": Text("full fine-tuning")}
SPEECH = {"accent": Text("accents"), GENERAL: Text("general speech")}
asr = load_model()


def change(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A change in percent with its interval, as far as they are known."""
    return "" if value != value else f"{value:+z.1f} %" + (f" [{low:+z.1f}, {high:+z.1f}]" if low == low else "")


def cells(row: pd.Series) -> list[str]:
    """What the paper and we have of one domain: error rate and change, or why there is none."""
    rate = f"{row.paper_cer:.2f} %" if row.paper_cer == row.paper_cer else t("not in the paper")
    ours = f"{row.wer:.1f} %" if row.wer == row.wer else t(str(row.state))
    return [" · ".join(filter(None, both)) for both in (
        (rate, change(row.paper_change)), (ours, change(row.change, row.change_low, row.change_high)),
    )]  # fmt: skip


def markdown(data: pd.DataFrame) -> str:
    """One of the tables, with the paper and this model side by side."""
    domains = list(data.domain.unique())
    heads = [t("Method"), t("Trained, paper"), t("Trained, here")]
    for domain in domains:
        heads += [t("Accents, paper"), t("Accents, here")] if domain == "accent" else [t("General, paper"), t("General, here")]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for label, rows in data.groupby("label", sort=False):
        first = rows.iloc[0]
        trained = f"{first.trained:,.0f}" if first.trained == first.trained else ""
        line = [t(str(label)), f"{first.paper_trained:g} M" if first.paper_trained == first.paper_trained else "", trained]
        for _, row in rows.iterrows():
            line += cells(row)
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines).replace(" %", "\u00a0%")


def order(pairs: pd.DataFrame, summary: Results) -> None:
    """Show where methods stand in another order than in the paper, and what may explain it."""
    turned = pairs[pairs.order == "opposite"]
    lines = [
        t(
            "- On {speech}, **{first}** against **{second}**: {ours} here, {paper} in the paper.",
            first=t(row["first"]), second=t(row.second), speech=SPEECH[row.domain], ours=change(row.ours, row.low, row.high),
            paper=change(row.paper),
        )
        for _, row in turned.iterrows()
    ]  # fmt: skip
    st.markdown("\n".join(lines) or t("No pair of methods stands in the opposite order."))
    st.download_button(
        t("All pairs (CSV)"),
        pairs.to_csv(index=False),
        "paper-order.csv",
        "text/csv",
        icon=":material/download:",
        on_click="ignore",
    )
    st.markdown("\n".join([t("What may explain another order:"), *reasons(summary)]))


def reasons(summary: Results) -> list[str]:
    """In what our setting differs from the paper's, with the figures of both."""
    base, full = summary.methods.get("base"), summary.methods.get("full")
    found = []
    if base and {"accent", GENERAL} <= set(base.domains) and base.domains[GENERAL].wer:
        far = base.domains["accent"].mean_over_accents / base.domains[GENERAL].wer
        theirs = paper.row("base")
        if theirs and theirs.target and theirs.general:
            found.append(
                t(
                    "- **How far the target lies.** On the target our base makes {ours} times the errors of general speech, the "
                    "paper's {paper} times. The further the target, the more full fine-tuning forgets.",
                    ours=f"{far:.1f}", paper=f"{theirs.target / theirs.general:.1f}",
                )
            )  # fmt: skip
    if full and full.trainable:
        found.append(
            t(
                "- **Size.** Full fine-tuning trains {ours} parameters here and 51 million in the paper; one expert's rank is a "
                "larger share of a smaller layer.",
                ours=f"{full.trainable:,}",
            )
        )  # fmt: skip
    if summary.accent_recogniser:
        found.append(
            t(
                "- **The accent recogniser** is right in {ours} % of test utterances here and in 81.44 % in the paper.",
                ours=f"{100 * summary.accent_recogniser.balanced_accuracy:.1f}",
            )
        )  # fmt: skip
    return [
        *found,
        t("- **Speech.** The paper has 1,542 hours of real Mandarin, we have a few hours of mostly synthetic English."),
        t(
            "- **Learning rates.** Ours were chosen on dev speech with as many trials for each method; the paper does not give its own."
        ),
    ]


st.title(t("The paper and this model"))
folder = results.folders(asr).get("paper")
summary = results.summary_of(folder) if folder else None
everything = figures.paper_data(summary)
done, rows = figures.rows_computed(everything)
pairs = figures.order_data(summary) if summary else pd.DataFrame()
if len(pairs):
    count = pairs.order.value_counts()
    st.markdown(
        t(
            "Of {pairs} pairs of methods **{same} stand in the paper's order**, {opposite} in the opposite one, and {open} are open: "
            "their interval includes zero.",
            pairs=len(pairs), same=count.get("same", 0), opposite=count.get("opposite", 0), open=count.get("open", 0),
        )
    )  # fmt: skip
so_far = (
    ""
    if summary is None or done >= rows
    else t("{done} of {rows} rows are computed so far; `sh runs/paper.sh` goes on.", done=done, rows=rows)
)
st.caption(
    t(
        "An error rate counts what was heard wrong, added or missing, per hundred that were said. The paper ({source}) counts "
        "characters of Mandarin, we count words of English. So compare changes in percent, not error rates.",
        source=paper.SOURCE,
    )
    + " " + so_far
)  # fmt: skip
if session().model == REAL:
    st.info(t("Our side of these tables belongs to the controlled experiment; choose the small model in the sidebar to see it."))
elif summary is None:
    st.info(t("Our side of these tables is not computed yet: `sh runs/paper.sh` trains and judges every method."))
left, right = st.columns(2)
links.set_widget("paper_table", "table", list(TABLES), "I")
links.set_widget("paper_against", "against", list(BASES), "base")
table = str(
    left.segmented_control(t("Table"), list(TABLES), required=True, key="paper_table", format_func=lambda k: t(TABLES[k]))
)
against = str(
    right.segmented_control(
        t("Change of errors against"), list(BASES), required=True, key="paper_against", format_func=lambda k: t(BASES[k])
    )
)
links.write(table=table if table != "I" else "", against=against if against != "base" else "")
chosen = everything[(everything.table == table) & (everything.against == against)]
for column, (domain, data) in zip(st.columns(chosen.domain.nunique()), chosen.groupby("domain", sort=False), strict=True):
    with column:
        st.header(t("Accents, mean") if domain == "accent" else t("General speech"))
        plots.show(
            figures.paper_changes(data.assign(label=data.label.map(t))), f"paper-table-{table}-{domain}", data,
            t("left of zero a method makes fewer errors than {against}; diamonds are the paper's, discs ours with 95 % intervals; "
 "* not computed yet, – not part of our comparison.",
              against=BASES[against]),
            f"paper-{domain}",
        )  # fmt: skip
if table == "II":
    st.caption(t("The paper's recognisers are right in 62.97 % (not converged) and 81.44 % (as trained) of utterances."))
with st.expander(t("The table with all numbers")):
    st.markdown(markdown(chosen))
st.download_button(
    t("All tables (CSV)"),
    everything.to_csv(index=False),
    "paper-tables.csv",
    "text/csv",
    icon=":material/download:",
    on_click="ignore",
)
if summary:
    results.verdicts(summary.claims, first=0)
if summary and len(pairs):
    with st.expander(t("Where the order is another, and what may explain it")):
        order(pairs, summary)
with st.expander(t("Experts at work, from the lowest layer to the highest")):
    st.markdown(t("The paper's Figure 2 gives no numbers: its lower layers use more experts, its higher layers fewer."))
    routing = folder / "routing.parquet" if folder else None
    if routing and routing.is_file():
        used = results.read_table(routing)
        active = figures.active_data(used)
        plots.show(
            figures.active(active, used.expert.nunique()), "paper-active-experts", active,
            t("a row is an accent as spoken, a column a layer, lowest first; each number is the mean of experts with a weight above zero."),
            "paper-active",
        )  # fmt: skip
    else:
        st.markdown(t("Ours: not computed yet."))
if summary:
    results.origin(summary)
