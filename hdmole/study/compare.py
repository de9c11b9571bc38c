"""The comparison: every method trained over seeds from one frozen base, judged on the same speech, in one folder.

    trials (learning rates, on dev) -> runs (method x seed: adapter, transcripts, curve) -> analysis -> results

Each step leaves a file in `out/work` and is skipped when that is there, so a comparison that was cut off goes on where it
was. Under `accelerate launch` the processes share the steps among them, each training whole runs; `out` must then be a
folder that all of them see.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import TrainerCallback

from hdmole.names import GENERAL
from hdmole.speech.words import score
from hdmole.study import analyses
from hdmole.study.bench import side_by_side
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import claims
from hdmole.study.config import Comparison, ConfigError, read_config
from hdmole.study.results import Attribution, FrontierPoint, Results, Routing, Trial, base_digest, provenance, save
from hdmole.training.adapt import Adaptation, Around, Speech, adapt, equal_rank, hear, load_base, trainable, with_adapter
from hdmole.training.preparation import speech_digest, speech_of

CURVE_POINTS = 8
SPEED_ROUNDS = 5  # of decoding, of which the median time counts


class _Curve(TrainerCallback):
    """Word error rates on dev speech while a method is trained, kept in a file so that a resumed run goes on with it."""

    def __init__(self, file: Path, measure: Callable[[], dict[str, float]]) -> None:
        self.file, self.measure = file, measure
        self.points: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        every = max(1, state.max_steps // CURVE_POINTS)
        if (state.global_step % every == 0 or state.global_step == state.max_steps) and str(state.global_step) not in self.points:
            self.points[str(state.global_step)] = self.measure()
            _write(self.file, self.points)


def _write(file: Path, value: Any) -> None:
    """Write JSON such that the file is there only when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(file)


@dataclass(frozen=True)
class Step:
    """One piece of work: a folder, the file that is there when it is done, and the settings it was made with."""

    folder: Path
    result: str
    settings: dict[str, Any]

    @property
    def done(self) -> Path:
        return self.folder / self.result

    @property
    def finished(self) -> bool:
        return self.done.is_file() and self._same()

    def _same(self) -> bool:
        file = self.folder / "settings.json"
        return file.is_file() and json.loads(file.read_text()) == self.settings

    def begin(self, report: Callable[[str], None]) -> bool:
        """Whether there is something to do; what was made with other settings is thrown away first."""
        if self.folder.is_dir() and not self._same():
            report(f"{self.folder.name}: its settings have changed, so it is made anew")
            shutil.rmtree(self.folder)
        if not self.finished:
            _write(self.folder / "settings.json", self.settings)
        return not self.finished


class Runner:
    """The steps of one comparison; `rank` of `world` processes share them."""

    def __init__(
        self, comparison: Comparison, out: Path, speech: Speech, extra: dict[str, Speech], report: Callable[[str], None],
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.comparison, self.out, self.speech, self.extra = comparison, out, speech, extra
        self.work, self.rank, self.world, self.report = out / "work", rank, world, report
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.digest = speech_digest(speech, extra)
        base = load_base(speech.base)
        size = trainable(with_adapter(load_base(speech.base), comparison.known["hdmole"], speech.recogniser))
        self.methods = {
            name: replace(m, options={**m.options, "r": equal_rank(base, size, m.place)}) if m.options.get("r") == "equal" else m
            for name, m in comparison.known.items()
        }

    def settings(self, adaptation: Adaptation, epochs: float, rate: float, seed: int) -> dict[str, Any]:
        """What decides how a run comes out, for JSON."""
        kept = {name: getattr(adaptation, name) for name in ("kind", "replay", "share", "place", "true_accent", "warm_share")}
        return {**kept, "options": dict(adaptation.options), "epochs": epochs, "rate": rate, "seed": seed, "speech": self.digest}

    def mine(self, jobs: Iterable[Any]) -> list[Any]:
        """This process' part of the steps."""
        return list(jobs)[self.rank :: self.world]

    def wait(self, done: Callable[[], list[bool]]) -> None:
        """Until the other processes have done their part."""
        while missing := done().count(False):
            self.report(f"waiting for {missing} results of other processes")
            time.sleep(20)

    # -- learning rates -----------------------------------------------------------------------------------------------

    def trial(self, family: str, rate: float) -> None:
        method, step = self.methods[family], self.trial_step(family, rate)
        if step.begin(self.report):
            model = adapt(
                self.speech, method, step.folder / "adapter", epochs=self.comparison.trial_epochs, rate=rate, seed=0,
                report=self.report, device=self.device,
            )  # fmt: skip
            _write(step.done, {"method": family, "rate": rate, **self.dev(model, method)})
            _remove(step.folder / "adapter", step.folder / "adapter-training")

    def trial_step(self, family: str, rate: float) -> Step:
        settings = self.settings(self.methods[family], self.comparison.trial_epochs, rate, 0)
        return Step(self.work / "trials" / f"{family}-{rate:g}", "dev.json", settings)

    def dev(self, model: nn.Module, adaptation: Adaptation, every: int = 1) -> dict[str, float]:
        """Word error rates in % on dev speech, of which each `every`-th utterance is heard: mean over accents, general domain."""
        model.eval()
        rows = [i for domain in ("accent", GENERAL) for i in self.speech.corpus.select("dev", domain)[::every]]
        return analyses.mean_rates(self.errors(self.speech, model, adaptation, rows))

    def errors(
        self, speech: Speech, model: nn.Module, adaptation: Adaptation, rows: list[int], around: Around | None = None
    ) -> pd.DataFrame:
        """One row per utterance, with what was heard and the errors."""
        index = speech.corpus.index.iloc[rows]
        heard = score(index.text, hear(speech, model, adaptation, rows, around))
        table = index[["domain", "accent", "speaker", "utterance"]].reset_index(drop=True)
        return table.assign(reference=index.text.to_numpy(), **heard)

    def rates(self) -> dict[str, float]:
        """The learning rate with the fewest errors on dev accents, per family; all trials must be there."""
        tried, best = self.tried(), {}
        for family, rates in self.comparison.rates.items():
            found = [t for t in tried if t["method"] == family] or [{"rate": rates[0], "accent": 0.0}]
            best[family] = min(found, key=lambda t: t["accent"])["rate"]
        return best

    def trials(self) -> list[tuple[str, float]]:
        """Family and learning rate of each trial; a family with one rate needs none."""
        return [(family, rate) for family, rates in self.comparison.rates.items() if len(rates) > 1 for rate in rates]

    def tried(self) -> list[dict[str, Any]]:
        """What each trial found."""
        return [json.loads(self.trial_step(family, rate).done.read_text()) for family, rate in self.trials()]

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run_step(self, name: str, seed: int, rates: dict[str, float]) -> Step:
        rate = rates.get(self.methods[name].rate or name, 0.0)
        settings = self.settings(self.methods[name], self.comparison.epochs, rate, seed)
        return Step(self.work / f"{name}-{seed}", "utterances.parquet", settings)

    def run(self, name: str, seed: int, rates: dict[str, float]) -> None:
        step, method, started = self.run_step(name, seed, rates), self.methods[name], time.time()
        folder = step.folder
        if not step.begin(self.report):
            return
        clock = _Clock(folder / "seconds.json")
        callbacks: list[TrainerCallback] = [clock]
        if name in self.comparison.watched and seed == self.comparison.seeds[name][0]:
            holder: list[Any] = []
            callbacks += [_Watch(holder), _Curve(folder / "curve.json", lambda: self.dev(holder[0], method, every=2))]
        model = adapt(
            self.speech, method, folder / "adapter", epochs=self.comparison.epochs, rate=step.settings["rate"], seed=seed,
            report=self.report, callbacks=callbacks, device=self.device,
        )  # fmt: skip
        tables = [self.errors(self.speech, model, method, self.test_rows())]
        for domain, speech in self.extra.items():
            rows = list(range(len(speech.corpus.index)))
            tables.append(self.errors(speech, model, method, rows).assign(domain=domain))
        table = pd.concat(tables, ignore_index=True).assign(method=name, seed=seed)
        count = (
            0 if method.kind == "base" else trainable(with_adapter(load_base(self.speech.base), method, self.speech.recogniser))
        )
        dev = self.dev(model, method)
        _write(folder / "run.json", {"trainable": count, "seconds": round(clock.before + time.time() - started), "dev": dev})
        _remove(folder / "adapter-training", folder / "adapter-warming")
        part = step.done.with_suffix(".part")
        table.to_parquet(part, index=False)
        part.replace(step.done)
        wer = table.groupby("domain")[["errors", "words"]].sum()
        self.report(f"{name}, seed {seed}: " + ", ".join(f"{d} {100 * r.errors / r.words:.2f} %" for d, r in wer.iterrows()))

    def test_rows(self) -> list[int]:
        return self.speech.corpus.select("test", "accent", GENERAL, "real_digits", "unseen")

    # -- analysis -----------------------------------------------------------------------------------------------------

    @property
    def analysed(self) -> Path:
        """The folder of the HDMoLE run that is analysed, the first."""
        return self.work / f"hdmole-{self.comparison.seeds['hdmole'][0]}"

    def trained(self, name: str, run: Path) -> Any:
        """The model that a finished run left in its folder. Raises ConfigError where it is no longer there."""
        method, folder = self.methods[name], run / "adapter"
        if method.kind != "base" and not folder.is_dir():
            raise ConfigError(
                "config.adapter_gone",
                "{name} has lost its adapter; remove the folder {folder} to have it trained again.",
                name=run.name,
                folder=run,
            )
        return adapt(self.speech, method, folder, epochs=0, rate=0, seed=0, report=self.report, device=self.device)

    def analyse(self, kind: str) -> None:
        """One of `analyses.ANALYSES`, of the first HDMoLE run."""
        file = self.analysed / f"{kind}.json"
        if not file.is_file():
            model, adaptation = self.trained("hdmole", self.analysed), self.methods["hdmole"]
            subject = analyses.Subject(
                model, self.speech, self.extra,
                hear=lambda speech, rows, around: self.errors(speech, model, adaptation, rows, around),
                log_likelihood=lambda rows: analyses.log_likelihood(self.speech, model, adaptation, rows),
                folder=self.analysed,
            )  # fmt: skip
            _write(file, analyses.ANALYSES[kind](subject))
            self.report(f"{kind} done")

    def speed(self, rates: dict[str, float]) -> dict[str, float]:
        """How long each method takes to decode the same test speech, as a multiple of the frozen base beside it.

        Encoder outputs are given, unless one of the methods changes the encoder: then each encodes the speech as well.
        """
        names, seeds = self.comparison.methods, self.comparison.seeds
        methods = {name: self.methods[name] for name in names}
        if any(m.place == "encoder" for m in methods.values()):
            methods = {name: replace(m, place="encoder") for name, m in methods.items()}
        steps = {name: self.run_step(name, seeds[name][0], rates) for name in names}
        step = Step(self.work / "speed", "speed.json", {name: s.settings for name, s in steps.items()})
        if step.begin(self.report):
            rows = self.speech.corpus.select("test", "accent")
            rows = rows[:: max(1, len(rows) // 24)][:24]
            base, ratios = load_base(self.speech.base, self.device), {}
            for name, run in steps.items():
                model = self.trained(name, run.folder)
                contenders: dict[str, Callable[[], Any]] = {
                    "base": partial(hear, self.speech, base, methods["base"], rows),
                    name: partial(hear, self.speech, model, methods[name], rows),
                }
                ratios[name] = side_by_side(contenders, rounds=SPEED_ROUNDS)[name]["ratio"]
            _write(step.done, ratios)
            self.report("speed done")
        found: dict[str, float] = json.loads(step.done.read_text())
        return found

    def everything(self) -> Results | None:
        """Run what is missing; the first process returns the results, the others None."""
        started = time.time()
        for family, rate in self.mine(self.trials()):
            self.trial(family, rate)
        self.wait(lambda: [self.trial_step(family, rate).finished for family, rate in self.trials()])
        rates = self.rates()
        jobs = self.comparison.jobs()
        for name, seed in self.mine(jobs):
            self.run(name, seed, rates)
        self.wait(lambda: [self.run_step(name, seed, rates).finished for name, seed in jobs])
        kinds = list(analyses.ANALYSES) if "hdmole" in self.comparison.methods else []
        for kind in self.mine(kinds):
            self.analyse(kind)
        if self.rank:
            return None
        self.wait(lambda: [(self.analysed / f"{kind}.json").is_file() for kind in kinds])
        return self.publish(rates, kinds, time.time() - started)

    # -- results ------------------------------------------------------------------------------------------------------

    def publish(self, rates: dict[str, float], kinds: list[str], seconds: float) -> Results:
        """Write `utterances.parquet`, `routing.parquet` and `summary.json` to the results folder."""
        jobs = self.comparison.jobs()
        order = self.comparison.methods
        folders = {job: self.work / f"{job[0]}-{job[1]}" for job in sorted(jobs, key=lambda j: (order.index(j[0]), j[1]))}
        rows = pd.concat([pd.read_parquet(f / "utterances.parquet") for f in folders.values()], ignore_index=True)
        notes = {job: json.loads((f / "run.json").read_text()) for job, f in folders.items()}
        origin = provenance(
            0, self.device, base_sha256=base_digest(self.speech.base), data_sha256=self.digest, seeds=sorted({s for _, s in jobs}),
            epochs=self.comparison.epochs, run_seconds=sum(n["seconds"] for n in notes.values()), last_session_seconds=round(seconds),
            config=self.comparison.text,
        )  # fmt: skip
        results = summarise(rows, origin)
        results.decoding_time = self.speed(rates)
        for name, entry in results.methods.items():
            seeds = self.comparison.seeds[name]
            method, note = self.methods[name], notes[name, seeds[0]]
            entry.label, entry.trainable, entry.seeds, entry.dev = method.label, note["trainable"], seeds, note.get("dev")
            if method.kind != "base":
                entry.learning_rate, entry.place = rates[method.rate or name], method.place
            for domain, rate in entry.domains.items():
                of = rows[(rows.method == name) & (rows.domain == domain)].groupby("seed")[["errors", "words"]].sum()
                rate.per_seed = {int(str(s)): round(float(100 * r.errors / r.words), 2) for s, r in of.iterrows()}
        results.trials = [Trial(learning_rate=tried.pop("rate"), **tried) for tried in self.tried()]
        results.curves = {
            name: json.loads(f.read_text())
            for name in self.comparison.watched
            if (f := folders[name, self.comparison.seeds[name][0]] / "curve.json").is_file()
        }
        if self.speech.recogniser is not None and self.speech.posteriors is not None:
            results.accent_recogniser = analyses.recogniser_results(
                self.speech.corpus, self.speech.recogniser.labels, self.speech.posteriors
            )
        if kinds:
            found = {kind: json.loads((self.analysed / f"{kind}.json").read_text()) for kind in kinds}
            results.routing = Routing.model_validate(found["routing"])
            results.frontier = [FrontierPoint.model_validate(point) for point in found["frontier"]]
            results.attribution = Attribution.model_validate(found["attribution"])
        results.claims = claims(results)
        save(self.out, results, rows)
        if kinds:
            shutil.copy(self.analysed / "routing.parquet", self.out / "routing.parquet")
        return results


class _Clock(TrainerCallback):
    """Seconds of training, kept beside each checkpoint, so that a run that was cut off counts them all; `before`: of earlier sessions."""

    def __init__(self, file: Path) -> None:
        self.file, self.started = file, time.time()
        self.before: float = json.loads(file.read_text()) if file.is_file() else 0.0

    def on_save(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        _write(self.file, round(self.before + time.time() - self.started, 1))


class _Watch(TrainerCallback):
    """Keeps hold of the model that is trained."""

    def __init__(self, holder: list[Any]) -> None:
        self.holder = holder

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.holder[:] = [model]


def _remove(*folders: Path) -> None:
    """Remove what a finished step no longer needs, its checkpoints among it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def compare(config: Path, out: Path, report: Callable[[str], None]) -> Results | None:
    """Run a comparison; returns the results, None in all but the first process.

    Raises ConfigError, ManifestError and ModelError before anything is trained.
    """
    rank, world = processes()
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", report, rank)
    return Runner(comparison, out, speech, extra, report, rank, world).everything()


def processes() -> tuple[int, int]:
    """This process' number and how many `accelerate launch` started; each then trains alone, on its own GPU.

    The variables are taken away, so that transformers' Trainer does not spread one run over the processes.
    """
    rank, world = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
    local = os.environ.pop("LOCAL_RANK", None)
    if local is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(local)] if visible else local
    return rank, world
