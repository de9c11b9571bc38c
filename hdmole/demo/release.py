"""Write the released folder: weights, samples, in-domain score, results and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import ParakeetFeatureExtractor

from hdmole.demo.corpus import N_MELS, render
from hdmole.demo.samples import write_samples
from hdmole.demo.synth import ACCENTS, Synthesiser
from hdmole.demo.text import vocabulary
from hdmole.files import write_text
from hdmole.models.speech_llm import SpeechLLM
from hdmole.names import GENERAL, METHOD_NAMES
from hdmole.speech.asr import ASR
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.decoding import Encoded
from hdmole.speech.domain import SCORE, DomainScorer
from hdmole.speech.loading import SUMS, write_sums
from hdmole.speech.words import score
from hdmole.study.analyses import mean_rates, recogniser_results
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import claims
from hdmole.study.results import InDomain, Results, base_digest, provenance, save
from hdmole.study.tables import markdown_table
from hdmole.training.data import Corpus, States

INSIDE = (GENERAL, "accent", "real_digits")


@dataclass(frozen=True)
class Trained:
    """The results of a build's stages, and the speech that the model is judged on.

    Args:
        work: folder with base, tokenizer and adapters.
        seed: random seed of the build, and of the speakers and sentences of the samples.
        jobs: how each utterance of the corpus was made.
        posteriors: accent posterior of each utterance, (utterances, accents).
        report: called with each line about the progress.
    """

    work: Path
    seed: int
    jobs: list[dict[str, Any]]
    corpus: Corpus
    states: States
    posteriors: np.ndarray
    report: Callable[[str], None]


def release(trained: Trained, out: Path) -> Results:
    """Write the released folder and return its results."""
    (out / SUMS).unlink(missing_ok=True)  # of the release that was here before; the new ones are written last
    weights(trained.work, out)
    asr, dev = choose(trained, out)
    rows = judge(trained, asr)
    hours = trained.corpus.index.groupby(["split", "domain"]).seconds.sum() / 3600
    origin = provenance(
        trained.seed, str(asr.device), base_sha256=base_digest(out),
        data="synthetic speech (espeak-ng) and real recordings by unseen speakers, see README.md",
        hours={" ".join(map(str, key)): round(float(h), 2) for key, h in zip(hours.index.tolist(), hours, strict=True)},
    )  # fmt: skip
    results = summarise(rows, origin)
    for method, entry in results.methods.items():
        entry.trainable, entry.dev = asr.trainable(method), dev[method]
    results.accent_recogniser = heard = recogniser_results(trained.corpus, list(ACCENTS), trained.posteriors)
    trained.report(f"recogniser: balanced accuracy on test speakers {heard.balanced_accuracy:.1%}")
    results.in_domain = in_domain(trained, asr, out)
    results.samples = write_samples(asr, rows, out / "samples", trained.seed, trained.report)
    results.claims = claims(results)
    save(out / "results", results, rows)
    write_text(out / "README.md", model_card(results))
    write_sums(out)
    trained.report("results:\n" + markdown_table(results))
    return results


def weights(work: Path, out: Path) -> None:
    """Write base, adapters, tokenizer and feature extractor. The weights are in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    base = SpeechLLM.from_pretrained(work / "base", dtype=torch.float16, use_safetensors=True, trust_remote_code=False)
    base.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for part in ("audio_config", "text_config"):
        config[part].pop("_name_or_path", None)  # a path on the machine that trained the part
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "tokenizer" / file, out / file)
    ParakeetFeatureExtractor(feature_size=N_MELS, sampling_rate=SAMPLE_RATE).save_pretrained(out)
    for name in ("lora", "hdmole", "hdmole-extended", "full"):
        if not (work / name).is_dir():
            continue
        folder = out / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        for tensors in (work / name).glob("*.safetensors"):
            save_file({k: v.half().contiguous() for k, v in load_file(tensors).items()}, folder / tensors.name, {"format": "pt"})
        adapter = work / name / "adapter_config.json"
        if adapter.is_file():
            values = json.loads(adapter.read_text()) | {"base_model_name_or_path": None}
            (folder / adapter.name).write_text(json.dumps(values, indent=1) + "\n")


def choose(trained: Trained, out: Path) -> tuple[ASR, dict[str, dict[str, float]]]:
    """Keep the extended variant only if it makes fewer errors on dev accents than HDMoLE.

    Returns:
        The released model, and word error rates in % on dev speech by method and domain: the mean
        over accents, and the general domain.
    """
    asr = ASR.load(out)
    table = judge(trained, asr, "dev", ("accent", GENERAL))
    dev = {str(method): mean_rates(of) for method, of in table.groupby("method", sort=False)}
    if "hdmole-extended" in dev and dev["hdmole-extended"]["accent"] >= dev["hdmole"]["accent"]:
        shutil.rmtree(out / "adapters" / "hdmole-extended")
        trained.report("hdmole-extended is not better on dev accents than hdmole, so it is left out")
        asr = ASR.load(out)
    return asr, dev


def _segments(rows: list[int], states: States, asr: ASR, posteriors: np.ndarray) -> list[Encoded]:
    empty = torch.zeros(0)
    return [
        Encoded(np.zeros(0, np.float32), 0.0, torch.from_numpy(states.get(i).astype(np.float32)).to(asr.device), empty,
                torch.from_numpy(posteriors[i]).to(asr.device))
        for i in rows
    ]  # fmt: skip


def transcribe_rows(asr: ASR, method: str, rows: list[int], states: States, posteriors: np.ndarray) -> list[str]:
    """Transcripts of utterances from their cached encoder outputs, in the order of `rows`."""
    ordered = sorted(rows, key=lambda i: int(states.spans[0, i, 1]))
    texts: dict[int, str] = {}
    for k in range(0, len(ordered), 48):
        part = ordered[k : k + 48]
        heard = asr.decode_batch(_segments(part, states, asr, posteriors), method)
        texts.update({i: d.text for i, d in zip(part, heard, strict=True)})
    return [texts[i] for i in rows]


def judge(trained: Trained, asr: ASR, split: str = "test", domains: tuple[str, ...] = INSIDE) -> pd.DataFrame:
    """Transcribe the speech of a split and domains by every method, and count word errors.

    Returns:
        One row per utterance and method.
    """
    rows = trained.corpus.select(split, *domains)
    index = trained.corpus.index.iloc[rows]
    tables = []
    for method in asr.methods:
        heard = transcribe_rows(asr, method, rows, trained.states, trained.posteriors)
        tables.append(
            pd.DataFrame(
                {
                    "method": method, "seed": trained.seed, "domain": index.domain.to_numpy(), "accent": index.accent.to_numpy(),
                    "speaker": index.speaker.to_numpy(), "utterance": index.utterance.to_numpy(),
                    "reference": index.text.to_numpy(), **score(index.text, heard),
                }
            )
        )  # fmt: skip
        wer = tables[-1].groupby("domain")[["errors", "words"]].sum()
        trained.report(f"{split} {method}: " + ", ".join(f"{d} {100 * r.errors / r.words:.2f} %" for d, r in wer.iterrows()))
    return pd.concat(tables, ignore_index=True)


def in_domain(trained: Trained, asr: ASR, out: Path, most: int = 200) -> InDomain:
    """Fit the in-domain score on dev speech and sounds, and save it with the model.

    At most `most` utterances of each domain and split are used.

    Returns:
        Figures of the score on test speech and sounds.
    """
    known = set(vocabulary())
    index = trained.corpus.index
    tables: dict[str, pd.DataFrame] = {}
    with Synthesiser() as synthesiser:
        for split in ("dev", "test"):
            parts = []
            for domain in sorted(set(index.domain)):
                rows = trained.corpus.select(split, domain)
                if domain == "real_sentences":
                    rows = [i for i in rows if not set(index.text[i].split()) <= known]
                rows = np.random.default_rng(trained.seed).permutation(rows)[:most].tolist()
                segments = [asr.segment(render(trained.jobs[i], synthesiser))[0] for i in rows]
                segments.sort(key=lambda s: len(s.states))
                features = []
                for k in range(0, len(segments), 16):
                    heard = asr.decode_batch(segments[k : k + 16], "base")
                    features += [asr.domain_features(s, h) for s, h in zip(segments[k : k + 16], heard, strict=True)]
                parts.append(pd.DataFrame(features).assign(domain=domain))
            tables[split] = pd.concat(parts, ignore_index=True)
            trained.report(f"in-domain score: {split} features of {len(tables[split])} utterances")
    dev, test = tables["dev"], tables["test"]
    names = [c for c in dev.columns if c != "domain"]
    scorer = DomainScorer.fit(dev[names], dev.domain.to_numpy(), INSIDE)
    scores = scorer.scores(test)
    inside = test.domain.isin(INSIDE).to_numpy()
    result = InDomain(
        auroc=round(float(roc_auc_score(inside, scores)), 4),
        auroc_by_domain={},
        accepted={d: round(float((scores[test.domain == d] >= scorer.threshold).mean()), 3) for d in sorted(set(test.domain))},
        utterances={d: int((test.domain == d).sum()) for d in sorted(set(test.domain))},
    )
    for domain in sorted(set(test.domain) - set(INSIDE)):
        keep = inside | (test.domain == domain).to_numpy()
        result.auroc_by_domain[domain] = round(float(roc_auc_score(inside[keep], scores[keep])), 4)
    scorer.provenance = {**provenance(trained.seed, str(asr.device)).to_dict(), **result.to_dict()}
    scorer.save(out / SCORE)
    trained.report(f"in-domain score: AUROC {result.auroc:.3f} on test, {result.auroc_by_domain}")
    return result


def model_card(results: Results) -> str:
    """The README.md of the model folder. Every figure comes from the results."""
    methods, origin = results.methods, results.provenance
    recogniser, domain = results.accent_recogniser, results.in_domain
    # `release` has set all three.
    assert recogniser is not None and domain is not None and origin.hours is not None
    accents = "\n".join(f"| {a.name} | {a.label} | {a.rules} |" for a in ACCENTS.values())
    per_accent = methods["hdmole"].domains["accent"].accents
    header = "| Accent | " + " | ".join(METHOD_NAMES[m] for m in methods) + " |\n|---|" + "---:|" * len(methods)
    rows = "\n".join(
        f"| {a} | " + " | ".join(f"{methods[m].domains['accent'].accents[a].wer:.1f}" for m in methods) + " |" for a in per_accent
    )
    digits = methods["base"].domains["real_digits"].accents if "real_digits" in methods["base"].domains else {}
    digit_rows = "\n".join(
        f"| {a} ({r.speakers} speakers, {r.words} words) | "
        + " | ".join(f"{methods[m].domains['real_digits'].accents[a].wer:.1f}" for m in methods)
        + " |"
        for a, r in digits.items()
    )
    return f"""# The demo model

A small LLM-based speech recogniser, trained from nothing on one machine by `hdmole demo build`. It exists to show the
method at work, not to transcribe the world.

**It can hear** voice-assistant and call-centre English within {len(vocabulary()):,} words, digit strings, codes, amounts and dates,
as espeak-ng speaks it in nine accents, and digits read by real people. **How well**: its frozen base gets {methods["base"].domains["general"].wer:.0f} in a hundred words
wrong on the general accent, {methods["base"].domains["accent"].mean_over_accents:.0f} on the others, always of speakers and sentences it never met.

**It cannot hear** anything else: other words, real people saying free sentences, other languages, music. There it invents
fluent sentences. An in-domain score warns of that (below); it is not perfect.

**Its accents** are espeak-ng's own voices and, for the foreign ones, phoneme rules: caricatures, not people. Real recordings
were part of the base's training and count as "general" for the accent recogniser.

| Accent | Voice | What makes it |
|---|---|---|
{accents}

## Results

Word error rate in %, with 95 % intervals from a bootstrap over speakers, on speakers, sentences and recordings never
trained on. One seed.

{markdown_table(results)}

By accent:

{header}
{rows}

Digits read by real people, by accent:

{header}
{digit_rows}

Accent recogniser: {100 * recogniser.balanced_accuracy:.1f} % balanced accuracy over {len(recogniser.labels)} classes, unseen speakers.

In-domain score: AUROC {domain.auroc:.3f} between in-domain speech and everything else; by kind of sound outside:
{", ".join(f"{k.removeprefix('outside_').replace('_', ' ')} {v:.3f}" for k, v in domain.auroc_by_domain.items())}.

## Made by

`{origin.command}` at commit {origin.short_commit}, seed {origin.seed}, {origin.date}, on {origin.machine} ({origin.device}),
torch {origin.torch}, transformers {origin.transformers}. Hours of speech: {", ".join(f"{k} {v:g}" for k, v in origin.hours.items())}.
"""
