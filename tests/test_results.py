"""Counting errors, the record of results on disk, where results come from, and the README's tables."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from rows import ORIGIN, of_speakers, table
from safetensors.torch import save_file

from hdmole.errors import UserError
from hdmole.speech.words import count_errors, normalise
from hdmole.study import machine
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import judge
from hdmole.study.results import (
    COLUMNS,
    Claim,
    DomainRate,
    Failure,
    MethodResult,
    Rate,
    Results,
    ResultsError,
    base_digest,
    load,
    provenance,
    save,
)
from hdmole.study.tables import accent_table, claim_lines, markdown_table, update_readme

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "assets" / "results" / "archive"
PUBLISHED = [
    ROOT / "assets" / "demo" / "results",
    *sorted(f.parent for f in (ROOT / "assets" / "results").rglob("summary.json")),
]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("你好吗", "你们好 吗", (1, 3)),
        ("a b c", "a b c", (0, 3)),
        ("a b c", "a x c", (1, 3)),
        ("a b c", "", (3, 3)),
        ("a", "a b c", (2, 1)),
        ("", "a b", (2, 0)),
    ],
)
def test_count_errors(reference: str, hypothesis: str, expected: tuple[int, int]) -> None:
    assert count_errors(reference, hypothesis) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don\u2019t  STOP, O'Brien!", "don't stop o'brien"), ("'quoted' - a_b 7:30", "quoted a b seven three zero"), ("", ""),
        ("\u00dcber \u4f60\u597d", "\u00fcber \u4f60\u597d"), ("u\u0308ber", "\u00fcber"), ("हिन्दी में!", "हिन्दी में"),
    ],
)  # fmt: skip
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


# -- the record -----------------------------------------------------------------------------------------------------------


def small() -> Results:
    results = summarise(table(*of_speakers("base", [1, 2]), *of_speakers("hdmole", [1, 1])), ORIGIN)
    results.methods["hdmole"].learning_rate = 0.001
    results.curves = {"hdmole": {10: {"accent": 12.5}}}
    results.claims = [Claim(name="general_base", difference=-1.0, interval=(-2.0, 0.5), unit="points", verdict="not established")]
    results.failed = [Failure(audio="ä.wav", error="it is empty")]
    return results


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    rows = table(*of_speakers("base", [1, 2])).assign(more=1)
    save(tmp_path / "deep" / "er", small(), rows)
    assert load(tmp_path / "deep" / "er") == small()
    assert list(pd.read_parquet(tmp_path / "deep" / "er" / "utterances.parquet").columns) == COLUMNS
    text = (tmp_path / "deep" / "er" / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text)["version"] == 3 and text.startswith('{\n "version": 3,\n "methods": {') and text.endswith("}\n")
    assert '"interval": [-2.0, 0.5],\n' in text and '"audio": "ä.wav"' in text and "null" not in text


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (None, "results.missing", r"has no summary\.json; name a folder that `hdmole compare` or `hdmole evaluate` wrote\.$"),
        ("{", "results.damaged", r"summary\.json is not a summary of results; `hdmole evaluate --out DIR` writes one\.$"),
        ("[1]", "results.damaged", "is not a summary"),
        ("{}", "results.damaged", "is not a summary"),
        ('{"methods": 3}', "results.damaged", "is not a summary"),
        ('{"methods": {"base": []}}', "results.damaged", "is not a summary"),
        ('{"methods": {}, "differences": [], "routing": {"routers": {"odd": 1}}}', "results.damaged", "is not a summary"),
        ('{"version": 3, "methods": {}, "differences": []}', "results.damaged", "is not a summary"),
        ('{"version": 4}', "results.version", r"has layout 4, which this version of HDMoLE does not know; update HDMoLE to read it\.$"),
        ('{"version": 0}', "results.version", "has layout 0"),
        ("\xff", "results.damaged", "is not a summary"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, content: str | None, code: str, said: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ResultsError, match=said) as error:
        load(tmp_path)
    assert error.value.code == code and isinstance(error.value, UserError)


def test_a_file_is_not_a_results_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResultsError, match=r"has no summary\.json"):
        load(tmp_path / "file")


def test_the_record_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError):
        Rate.model_validate({"wer": 1, "interval": [0, 2], "errors": 1, "words": 9, "utterances": 1, "speakers": 1, "odd": 1})
    results = small()
    with pytest.raises(ValidationError):
        results.methods["base"].trainable = "many"  # type: ignore[assignment]


def test_results_without_a_version_are_read(tmp_path: Path) -> None:
    measure = {"value": 0.5, "interval": [0.25, 0.75]}
    both = {"purity": measure, "nmi": measure}
    rate = {"wer": 5.0, "interval": [4.0, 6.0], "errors": 1, "words": 20, "utterances": 2, "speakers": 2}
    domain = rate | {"mean_over_accents": 5.0, "mean_interval": [4.0, 6.0], "accents": {"a": rate}, "per_seed": {"0": 5.0}}
    values = {
        "methods": {"lora": {"rate": 0.002, "domains": {"accent": domain | {"change_against_base": {"points": -1.0}}}}},
        "differences": [],
        "trials": [{"method": "lora", "rate": 0.002, "accent": 9.0, "general": 3.0}],
        "claims": [{"claim": "Better than LoRA", "holds": True, "points": 0.2, "interval": [0.1, 0.3]}],
        "routing": {"utterances": 2, "active": {}, "routers": {
            name: {"all": both, "layers": {"first": both}} for name in ("combined", "global", "local")
        }},
        "provenance": ORIGIN.to_dict(),
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(values))
    results = load(tmp_path)
    assert results.methods["lora"].learning_rate == results.trials[0].learning_rate == 0.002
    assert results.methods["lora"].domains["accent"].per_seed == {0: 5.0} and results.provenance.base_sha256 is None
    assert results.claims == []  # of another kind than today's
    assert results.routing is not None and list(results.routing.routers) == ["gate", "global_gate", "local_probability"]
    least = {"methods": {"lora": {"domains": {"accent": domain}}}, "differences": [], "provenance": ORIGIN.to_dict()}
    (tmp_path / "summary.json").write_text(json.dumps(least))
    assert load(tmp_path).claims == load(tmp_path).trials == []
    second = small().to_dict() | {"version": 2, "claims": [{"text": "x", "holds": True, "points": 0.2, "interval": [0.1, 0.3]}]}
    (tmp_path / "summary.json").write_text(json.dumps(second))
    expected = small()
    expected.claims = []
    assert load(tmp_path) == expected


# -- where results come from ----------------------------------------------------------------------------------------------


def test_provenance_says_how_and_where() -> None:
    origin = provenance(3, "cpu", seeds=[1, 2])
    assert (origin.seed, origin.device, origin.torch, origin.seeds) == (3, "cpu", torch.__version__, [1, 2])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", origin.date) and re.search(r", \d+ cores$", origin.machine)
    with pytest.raises(ValidationError):
        provenance(3, "cpu", odd=1)


def test_provenance_names_files_without_their_folders_and_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/hdmole", "evaluate", "/data/m.jsonl", "--out", "b/c"])
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:1": "Fast One"}.get)
    origin = provenance(0, "cuda:1")
    assert (origin.command, origin.device) == ("hdmole evaluate m.jsonl --out b/c", "cuda:1, Fast One")


def test_the_processor_is_the_one_that_linux_names(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {Path("/proc/cpuinfo"): "flags: a\nmodel name : Chip 3: the fast: one\nmodel name : Other\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[path])
    assert machine.processor() == "Chip 3: the fast: one"
    files[Path("/proc/cpuinfo")] = "flags: a\n"
    monkeypatch.setattr("platform.machine", lambda: "some machine")
    for named, expected in (("", "some machine"), ("some processor", "some processor")):
        monkeypatch.setattr("platform.processor", lambda named=named: named)
        assert machine.processor() == expected


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_only_a_commit_of_this_repository_is_recorded_and_changed_code_is_marked(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    code = root / "hdmole" / "study" / "results.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    assert machine.commit(root) == "unknown"  # in no repository
    git(root, "init", "-q")
    assert machine.commit(root) == "unknown"  # in one that does not have it
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    commit = git(root, "rev-parse", "HEAD")
    assert len(commit) == 40 and machine.commit(root) == commit
    (root / "README.md").write_text("beside the code")
    assert machine.commit(root) == commit
    code.write_text("changed")
    assert machine.commit(root) == f"{commit} (with local changes)"
    packages = root / "venv" / "hdmole" / "study"  # the package as another project's repository may hold it
    packages.mkdir(parents=True)
    (packages / "results.py").write_text("")
    git(root, "add", "-f", ".")
    assert machine.commit(root / "venv") == "unknown"


def test_a_short_commit_keeps_its_mark() -> None:
    for mark in ("", " (with local changes)"):
        assert ORIGIN.model_copy(update={"commit": "0123456789abcdef" * 2 + mark}).short_commit == "0123456789ab" + mark
    assert ORIGIN.model_copy(update={"commit": "unknown"}).short_commit == "unknown"


def test_the_digest_of_a_base_is_that_of_its_weights(tmp_path: Path) -> None:
    def digest(name: str, **weights: torch.Tensor) -> str | None:
        folder = tmp_path / name
        folder.mkdir()
        for key, tensor in weights.items():
            save_file({key: tensor}, folder / f"{key}.safetensors")
        return base_digest(folder)

    a, b = torch.tensor([1.0, 0.1]), torch.tensor([[2.0]])
    found = digest("whole", a=a, b=b)
    assert found is not None and re.fullmatch("[0-9a-f]{16}", found)
    assert digest("half", a=a.half(), b=b.half()) == found  # its release in half precision
    others = {digest("other", a=a + 0.1, b=b), digest("name", a=a, c=b), digest("shape", a=a, b=b[0]), digest("fewer", a=a)}
    assert len(others | {found}) == 5
    assert digest("none") is None


# -- tables ---------------------------------------------------------------------------------------------------------------


def domain_rate(wer: float, mean: float, speakers: int = 5, **accents: float) -> DomainRate:
    def rate(value: float) -> dict[str, Any]:
        return dict(wer=value, interval=(value - 1, value + 2), errors=0, words=0, utterances=0, speakers=speakers)

    return DomainRate(
        **rate(wer), accents={name: Rate(**rate(value)) for name, value in accents.items()}, mean_over_accents=mean,
        mean_interval=(mean - 1, mean + 2),
    )  # fmt: skip


def tabled() -> Results:
    methods = {
        "base": MethodResult(
            domains={
                "unseen": domain_rate(30, 31), "general": domain_rate(4, 4, general=4), "accent": domain_rate(20, 25, a=22, b=28),
            },
            trainable=0,
        ),
        "full": MethodResult(domains={"accent": domain_rate(10, 15, a=12, b=18), "general": domain_rate(5, 5, general=5)}, trainable=8000),
        "mine": MethodResult(domains={"accent": domain_rate(11, 16, a=13, b=19), "general": domain_rate(6, 6, general=6)}, trainable=1000,
                             label="Mine"),
    }  # fmt: skip
    return Results(methods=methods, differences=[], provenance=ORIGIN)


def test_the_table_of_methods() -> None:
    results = tabled()
    assert markdown_table(results) == (
        "| Method | Trainable | Accents (mean) | General | Unseen accents |\n"
        "|---|---:|---:|---:|---:|\n"
        "| Frozen base | 0 | 25.0 [24.0, 27.0] | 4.0 [3.0, 6.0] | 30.0 [29.0, 32.0] |\n"
        "| Full fine-tuning | 8,000 (100.0 %) | 15.0 [14.0, 17.0] | 5.0 [4.0, 7.0] |  |\n"
        "| Mine | 1,000 (12.5 %) | 16.0 [15.0, 18.0] | 6.0 [5.0, 8.0] |  |"
    )
    results.decoding_time = {"base": 1.0, "full": 0.994}
    results.methods["mine"].trainable = None
    assert markdown_table(results, {"base": "基座"}).splitlines() == [
        "| Method | Trainable | Accents (mean) | General | Unseen accents | Decoding time |",
        "|---|---:|---:|---:|---:|---:|",
        "| 基座 | 0 | 25.0 [24.0, 27.0] | 4.0 [3.0, 6.0] | 30.0 [29.0, 32.0] | 1.00 × |",
        "| full | 8,000 (100.0 %) | 15.0 [14.0, 17.0] | 5.0 [4.0, 7.0] |  | 0.99 × |",
        "| mine |  | 16.0 [15.0, 18.0] | 6.0 [5.0, 8.0] |  |  |",
    ]
    del results.methods["full"]
    results.methods["mine"].trainable = 1000
    assert "| Mine | 1,000 |" in markdown_table(results)


def test_the_table_of_accents() -> None:
    assert accent_table(tabled()).splitlines() == [
        "| Accent | Frozen base | Full fine-tuning | Mine |",
        "|---|---:|---:|---:|",
        "| a | 22.0 [21.0, 24.0] | 12.0 [11.0, 14.0] | 13.0 [12.0, 15.0] |",
        "| b | 28.0 [27.0, 30.0] | 18.0 [17.0, 20.0] | 19.0 [18.0, 21.0] |",
        "| general | 4.0 [3.0, 6.0] | 5.0 [4.0, 7.0] | 6.0 [5.0, 8.0] |",
    ]


def test_a_readme_gets_table_claims_and_origin(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tabled()
    results.claims = [
        Claim(name="accents_lora", difference=-1.04, interval=(-2.0, -0.04), unit="percent", verdict="established"),
        Claim(name="accents_gated_lora", difference=0.5, interval=(-0.5, 1.5), unit="percent", verdict="not established"),
    ]
    said = (
        "- Better on accents than LoRA: **established** against zero (-1.0 % [-2.0, +0.0]); "
        "the paper does not compare them\n- Better on accents than LoRA times accent mass: **not established** against zero "
        "(+0.5 % [-0.5, +1.5]); the paper does not compare them"
    )
    assert claim_lines(results.claims) == said and claim_lines([]) == ""
    readme.write_text("Before\n<!-- mine -->\nold\n<!-- /mine -->\nafter <!-- results --><!-- /results -->\n")
    for seeds, shown in ((None, "0"), ([4, 5], "4, 5")):
        results.provenance.seeds = seeds
        save(tmp_path, results, table(*of_speakers("base", [1])))
        update_readme(readme, tmp_path, "mine")
        made = f"Measured 2026-11-27 12:00 UTC by `hdmole compare` (seed {shown}) on CPU, 2 cores, cpu."
        assert readme.read_text() == (
            f"Before\n<!-- mine -->\n{markdown_table(results)}\n\n{said}\n\n{made}\n<!-- /mine -->\n"
            "after <!-- results --><!-- /results -->\n"
        )
    for text in ("nothing", "<!-- /mine --> <!-- mine -->", "<!-- mine -->", "<!-- /mine -->"):
        readme.write_text(text)
        with pytest.raises(UserError, match="has no place for the table; mark it with <!-- mine --> and <!-- /mine -->"):
            update_readme(readme, tmp_path, "mine")
        assert readme.read_text() == text


# -- what is published ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_results_are_those_of_their_utterances(folder: Path) -> None:
    stored, rows = load(folder), pd.read_parquet(folder / "utterances.parquet")
    again = summarise(rows, stored.provenance)
    if json.loads((folder / "summary.json").read_text()).get("version", 1) < 3:  # without relative differences and today's claims
        again.differences = [d.model_copy(update={"relative": None}) for d in again.differences]
    else:
        assert stored.claims == judge(folder)
    assert stored.differences == again.differences and list(stored.methods) == list(again.methods)
    for method, entry in stored.methods.items():
        for domain, rate in entry.domains.items():
            of = rows[(rows.method == method) & (rows.domain == domain)]
            for seed, wer in (rate.per_seed or {}).items():
                assert wer == round(100 * of[of.seed == seed].errors.sum() / of[of.seed == seed].words.sum(), 2)
            assert rate.model_copy(update={"per_seed": None}) == again.methods[method].domains[domain]


def test_readme_and_documentation_show_the_published_results() -> None:
    real, demo = (load(ROOT / "assets" / model / "results") for model in ("real", "demo"))
    assert markdown_table(real) in (ROOT / "README.md").read_text()
    text = (ROOT / "docs" / "compare.md").read_text()
    assert markdown_table(demo) in text and claim_lines(demo.claims) in text
    main, text = ARCHIVE / "main", (ROOT / "docs" / "experiments" / "archive.md").read_text()
    assert markdown_table(load(main)) in text and claim_lines(judge(main)) in text and len(judge(main)) == 5
    paper = ROOT / "assets" / "results" / "paper"
    if paper.is_dir():
        text = (ROOT / "docs" / "compare.md").read_text()
        assert markdown_table(load(paper)) in text and claim_lines(load(paper).claims) in text


CONDITIONS = (  # what is compared under which condition: results, HDMoLE, full fine-tuning and LoRA times accent mass in them
    ("Encoder, one epoch (the headline)", "main", "hdmole", "full", "gated_lora"),
    ("Encoder, two epochs", "longer", "hdmole", "full", "gated_lora"),
    ("Projector, four epochs", "projector", "hdmole", "full", "gated_lora"),
    ("Projector, two epochs", "variants", "hdmole", "full", "gated_lora"),
    ("the same, true accent known", "variants", "true_accent", "full", "gated_lora"),
    ("the same, a tenth of the speech", "variants", "hdmole_tenth", "full_tenth", "gated_lora_tenth"),
    ("Encoder, one epoch, twelve accents that conflict", "conflicts", "hdmole", "full", "gated_lora"),
    ("the same, true accent known", "conflicts", "true_accent", "full", "gated_lora"),
)


def test_the_table_of_conditions_says_what_the_results_say() -> None:
    lines = []
    for condition, folder, mine, full, gated in CONDITIONS:
        results = load(ARCHIVE / folder)
        found = {(d.method, d.against, d.domain): d for d in results.differences}
        cells = []
        for against, domain in ((full, "accent"), (gated, "accent"), ("base", "general")):
            difference = found[mine, against, domain]
            low, high = difference.interval
            text = f"{difference.points:+z.1f} [{low:+z.1f}, {high:+z.1f}]"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        seeds = len(results.provenance.seeds or ())
        lines.append(f"| {condition} | `{folder}` | {seeds} | {' | '.join(cells)} |")
    assert "\n".join(lines) in (ROOT / "docs" / "experiments" / "archive.md").read_text(), "\n".join(lines)
