"""The comparison of methods.

All methods are trained from one frozen base, with several seeds, and judged on the same speech.

    for each method: trials (learning rates, on dev) -> run (adapter, transcripts, curve)
    analyses of HDMoLE -> runs of the other seeds

Each step writes a file to `out/work` and is skipped if the file is there. An interrupted comparison
therefore goes on where it stopped. The results of all finished runs are written now and then, so
that they can be looked at early. Several processes share the steps, and each of them trains whole
runs (`--processes`, `torchrun` or `accelerate launch`). With `--together` they train each run
together, and the first of them does all else. All of them must be able to read and write `out`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hdmole.files import alone, write_text, written
from hdmole.names import GENERAL
from hdmole.processes import Task, others, rank_and_count, share, train_together
from hdmole.speech.words import score
from hdmole.study import analyses
from hdmole.study.bench import side_by_side
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import claims
from hdmole.study.config import Comparison, ConfigError, read_config
from hdmole.study.results import Attribution, FrontierPoint, Results, Routing, Trial, base_digest, provenance, save
from hdmole.training.adapt import Adaptation, Around, Speech, adapt, equal_rank, hear, load_base, trainable, with_adapter
from hdmole.training.preparation import speech_digest, speech_of

T = TypeVar("T")
CURVE_POINTS = 8
PUBLISHING = 10  # results so far are written again after as many times the seconds that this took
SPEED_ROUNDS = 5  # rounds of decoding when speed is measured; their median counts


class _Curve(TrainerCallback):
    """Measures word error rates on dev speech during training.

    They are kept in a file, so that a resumed run has them all.
    """

    def __init__(self, file: Path, measure: Callable[[], dict[str, float]]) -> None:
        self.file, self.measure = file, measure
        self.points: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = max(1, state.max_steps // CURVE_POINTS)
        if (state.global_step % every == 0 or state.global_step == state.max_steps) and str(state.global_step) not in self.points:
            self.points[str(state.global_step)] = self.measure()
            _write(self.file, self.points)


def _write(file: Path, value: object) -> None:
    """Write JSON. The file appears only when it is complete."""
    write_text(file, json.dumps(value, indent=1) + "\n")


@dataclass(frozen=True)
class Step:
    """One step of a comparison.

    Args:
        folder: folder of the step's files.
        result: name of the file that is written last.
        settings: everything that decides the result. The step is run again if the folder was made
            with other settings.
    """

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
        """Prepare the folder, and return whether the step must be run.

        The folder is removed if it was made with other settings.
        """
        if self.folder.is_dir() and not self._same():
            report(f"{self.folder.name}: its settings have changed, so it is made anew")
            shutil.rmtree(self.folder)
        if not self.finished:
            _write(self.folder / "settings.json", self.settings)
        return not self.finished


class Runner:
    """The steps of one comparison.

    Args:
        comparison: the configuration.
        out: the results folder.
        speech: speech for training, dev and test.
        extra: further test sets, by domain.
        report: called with each line about the progress.
        rank: number of this process, from 0. Only the first one writes results.
        together: the processes, where they train each run together.
        accumulation: as in `hdmole.training.loop.fit`.
    """

    def __init__(
        self, comparison: Comparison, out: Path, speech: Speech, extra: dict[str, Speech], report: Callable[[str], None],
        rank: int = 0, together: PartialState | None = None, accumulation: int = 1,
    ) -> None:  # fmt: skip
        self.comparison, self.out, self.speech, self.extra = comparison, out, speech, extra
        self.together, self.accumulation = together, accumulation
        self.judges = together is None or rank == 0  # the others only train
        self.work, self.rank, self.report = out / "work", rank, report
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.started = time.time()
        self.next_publication = 0.0  # seconds since 1970
        self.digest = speech_digest(speech, extra)
        base = load_base(speech.base)
        size = trainable(with_adapter(load_base(speech.base), comparison.known["hdmole"], speech.recogniser))
        self.methods = {
            name: replace(m, options={**m.options, "r": equal_rank(base, size, m.place)}) if m.options.get("r") == "equal" else m
            for name, m in comparison.known.items()
        }

    def settings(self, adaptation: Adaptation, epochs: float, rate: float, seed: int) -> dict[str, Any]:
        """Everything that decides the result of a run, as values that JSON can hold."""
        kept = {f.name: getattr(adaptation, f.name) for f in fields(Adaptation) if f.name not in ("label", "rate")}
        defaults = vars(Adaptation("", adaptation.kind))
        # Without the defaults, a run stays valid where a later version gives Adaptation a new
        # field.
        kept = {name: value for name, value in kept.items() if name == "kind" or value != defaults[name]}
        if adaptation.recogniser:
            kept["posteriors"] = sha256(self.speech.recognised(adaptation.recogniser)[1].tobytes()).hexdigest()[:16]
        return {**kept, "epochs": epochs, "rate": rate, "seed": seed, "speech": self.digest}

    def first(self, do: Callable[[], T]) -> T:
        """What `do` returns; of processes that train together, only the first one does it."""
        return do() if self.together is None else broadcast_object_list([do() if self.judges else None])[0]

    def adapted(self, step: Step, method: Adaptation, callbacks: Sequence[TrainerCallback] = ()) -> nn.Module:
        """Train the model of a step."""
        epochs, rate, seed = (step.settings[name] for name in ("epochs", "rate", "seed"))
        model: nn.Module = adapt(
            self.speech, method, step.folder / "adapter", epochs=epochs, rate=rate, seed=seed, report=self.report,
            callbacks=callbacks if self.judges else (), device=self.device, accumulation=self.accumulation,
        )  # fmt: skip
        return model

    # -- learning rates -----------------------------------------------------------------------------------------------

    def trial(self, family: str, rate: float) -> None:
        """Train a method with one learning rate and measure it on dev speech."""
        method, step = self.methods[family], self.trial_step(family, rate)
        if self.first(lambda: step.begin(self.report)):
            model = self.adapted(step, method)
            if self.judges:
                _write(step.done, {"method": family, "rate": rate, **self.dev(model, method)})
                _remove(step.folder / "adapter", step.folder / "adapter-training")

    def trial_step(self, family: str, rate: float) -> Step:
        settings = self.settings(self.methods[family], self.comparison.trial_epochs, rate, 0)
        return Step(self.work / "trials" / f"{family}-{rate:g}", "dev.json", settings)

    def dev(self, model: nn.Module, adaptation: Adaptation, every: int = 1) -> dict[str, float]:
        """Word error rates in % on dev speech: the mean over accents, and the general domain.

        Every `every`-th dev utterance is transcribed.
        """
        model.eval()
        rows = [i for domain in ("accent", GENERAL) for i in self.speech.corpus.select("dev", domain)[::every]]
        return analyses.mean_rates(self.errors(self.speech, model, adaptation, rows))

    def errors(
        self, speech: Speech, model: nn.Module, adaptation: Adaptation, rows: list[int], around: Around | None = None
    ) -> pd.DataFrame:
        """Transcribe utterances and count errors. The table has one row per utterance."""
        index = speech.corpus.index.iloc[rows]
        heard = score(index.text, hear(speech, model, adaptation, rows, around))
        table = index[["domain", "accent", "speaker", "utterance"]].reset_index(drop=True)
        return table.assign(reference=index.text.to_numpy(), **heard)

    def family(self, name: str) -> str:
        """The method whose tuned learning rate a method takes; often the method itself."""
        return self.methods[name].rate or name

    def rate(self, name: str) -> float:
        """A method's learning rate: the one with the lowest word error rate on dev accents.

        All learning rates of the method's family must have been tried (`tuned`).
        """
        if self.methods[name].kind == "base":
            return 0.0
        family = self.family(name)
        if len(rates := self.comparison.rates[family]) == 1:
            return rates[0]
        return float(min(self.tried(family), key=lambda t: float(t["accent"]))["rate"])

    def tried(self, family: str) -> list[dict[str, Any]]:
        """The results of the trials of a family that are finished. A single rate has no trial."""
        rates = self.comparison.rates[family]
        steps = [self.trial_step(family, rate) for rate in rates] if len(rates) > 1 else []
        return [json.loads(step.done.read_text()) for step in steps if step.finished]

    # -- runs ---------------------------------------------------------------------------------------------------------

    def tuned(self, name: str) -> bool:
        """Whether all learning rates of a method's family have been tried."""
        rates = self.comparison.rates.get(self.family(name), [])
        return len(rates) < 2 or len(self.tried(self.family(name))) == len(rates)

    def run_step(self, name: str, seed: int) -> Step:
        """The step that trains and judges a method with one seed."""
        settings = self.settings(self.methods[name], self.comparison.epochs, self.rate(name), seed)
        return Step(self.work / f"{name}-{seed}", "utterances.parquet", settings)

    def finished(self, name: str, seed: int) -> bool:
        """Whether a run is finished.

        One whose learning rate or recogniser is not there yet is not.
        """
        known = self.methods[name].recogniser in ("", *self.speech.others)
        return known and self.tuned(name) and self.run_step(name, seed).finished

    def run(self, name: str, seed: int) -> None:
        """Train a method with one seed, transcribe all test speech, and write the results so far.

        Only the first process writes results.
        """
        step, method, started = self.first(lambda: self.run_step(name, seed)), self.methods[name], time.time()
        folder = step.folder
        if not self.first(lambda: step.begin(self.report)):
            return
        if twin := self.first(lambda: self._twin(step)):
            if self.judges:
                shutil.copytree(twin.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(step.result))
                self._finish(step, pd.read_parquet(twin.done).assign(method=name))
            return
        clock = _Clock(folder / "seconds.json")
        callbacks: list[TrainerCallback] = [clock]
        if name in self.comparison.watched and seed == self.comparison.seeds[name][0]:
            holder: list[nn.Module] = []
            callbacks += [_Watch(holder), _Curve(folder / "curve.json", lambda: self.dev(holder[0], method, every=2))]
        model = self.adapted(step, method, callbacks)
        if not self.judges:
            return
        tables = [self.errors(self.speech, model, method, self.test_rows())]
        for domain, speech in self.extra.items():
            rows = list(range(len(speech.corpus.index)))
            tables.append(self.errors(speech, model, method, rows).assign(domain=domain))
        table = pd.concat(tables, ignore_index=True).assign(method=name, seed=seed)
        count = (
            0 if method.kind == "base" else trainable(with_adapter(load_base(self.speech.base), method, self.speech.recogniser))
        )
        dev = self.dev(model, method)
        where = provenance(seed, self.device)
        note = {"trainable": count, "seconds": round(clock.before + time.time() - started), "dev": dev}
        _write(folder / "run.json", {**note, "machine": where.machine, "device": where.device})
        _remove(folder / "adapter-training", folder / "adapter-warming")
        self._finish(step, table)

    def _twin(self, step: Step) -> Step | None:
        """A finished run of another method whose settings are the same, if there is one."""
        others = (self.run_step(*job) for job in self.comparison.jobs() if self.finished(*job))
        return next((other for other in others if other.settings == step.settings), None)

    def _finish(self, step: Step, table: pd.DataFrame) -> None:
        with written(step.done) as part:
            table.to_parquet(part, index=False)
        wer = table.groupby("domain")[["errors", "words"]].sum()
        self.report(f"{step.folder.name}: " + ", ".join(f"{d} {100 * r.errors / r.words:.2f} %" for d, r in wer.iterrows()))
        if not self.rank and time.time() > self.next_publication:
            started = time.time()
            self.publish()
            self.next_publication = time.time() + PUBLISHING * (time.time() - started)

    def test_rows(self) -> list[int]:
        """The utterances that methods are judged on."""
        return self.speech.corpus.select("test", "accent", GENERAL, "real_digits", "unseen")

    # -- analysis -----------------------------------------------------------------------------------------------------

    @property
    def analysed(self) -> Path:
        """The folder of the HDMoLE run that is analysed: the one with the first seed."""
        return self.work / f"hdmole-{self.comparison.seeds['hdmole'][0]}"

    def trained(self, name: str, run: Path) -> nn.Module:
        """Load the model of a finished run.

        Raises:
            ConfigError: the adapter is no longer in the folder.
        """
        method, folder = self.methods[name], run / "adapter"
        if method.kind != "base" and not folder.is_dir():
            raise ConfigError(
                "config.adapter_gone",
                "{name} has lost its adapter; remove the folder {folder} to have it trained again.",
                name=run.name,
                folder=run,
            )
        model: nn.Module = adapt(self.speech, method, folder, epochs=0, rate=0, seed=0, report=self.report, device=self.device)
        return model

    def _is_analysed(self, kind: str) -> bool:
        file = self.analysed / f"{kind}.json"
        return file.is_file() and self.finished("hdmole", self.comparison.seeds["hdmole"][0])

    def analyse(self, kind: str) -> None:
        """Run one of `analyses.ANALYSES` on the first HDMoLE run."""
        file = self.analysed / f"{kind}.json"
        if self.judges and not file.is_file():
            model, adaptation = self.trained("hdmole", self.analysed), self.methods["hdmole"]
            subject = analyses.Subject(
                model, self.speech, self.extra,
                hear=lambda speech, rows, around: self.errors(speech, model, adaptation, rows, around),
                log_likelihood=lambda rows: analyses.log_likelihood(self.speech, model, adaptation, rows),
                folder=self.analysed,
            )  # fmt: skip
            _write(file, analyses.ANALYSES[kind](subject))
            self.report(f"{kind} done")

    def speed(self, name: str) -> float:
        """Decoding time of a method as a multiple of the frozen base's, on the same test speech.

        The stored encoder outputs are used, unless one of the methods adapts the encoder. Then
        every method encodes the speech too.
        """
        encode = any(self.methods[other].place == "encoder" for other in self.comparison.methods)
        base, method = (replace(self.methods[n], place="encoder") if encode else self.methods[n] for n in ("base", name))
        run = self.run_step(name, self.comparison.seeds[name][0])
        step = Step(self.work / "speed" / name, "speed.json", {**run.settings, "encode": encode})
        if step.begin(self.report):
            rows = self.speech.corpus.select("test", "accent")
            rows = rows[:: max(1, len(rows) // 24)][:24]
            model = self.trained(name, run.folder)
            contenders: dict[str, Callable[[], object]] = {
                "base": partial(hear, self.speech, load_base(self.speech.base, self.device), base, rows),
                name: partial(hear, self.speech, model, method, rows),
            }
            _write(step.done, side_by_side(contenders, rounds=SPEED_ROUNDS)[name]["ratio"])
        return float(json.loads(step.done.read_text()))

    def tasks(self) -> list[Task]:
        """All tasks in their order: of each method the trials of its learning rates, then a run.

        The first HDMoLE run is analysed at once.
        """
        tasks: list[Task] = []
        tried: set[str] = set()
        for name, seed in self.comparison.jobs():
            family = self.family(name)
            rates = self.comparison.rates.get(family, [])
            for rate in rates if family not in tried and len(rates) > 1 else []:
                step = self.trial_step(family, rate)
                tasks.append(
                    Task(f"{family}-{rate:g}", lambda: True, partial(_finished, step), partial(self.trial, family, rate))
                )
            tried.add(family)
            job = name, seed
            tasks.append(
                Task(f"{name}-{seed}", partial(self._ready, *job), partial(self.finished, *job), partial(self.run, *job))
            )
            if job == ("hdmole", self.comparison.seeds[name][0]):
                ready = partial(self.finished, *job)
                tasks += [Task(kind, ready, partial(self._is_analysed, kind), partial(self.analyse, kind)) for kind in self.kinds]
        return tasks

    @property
    def kinds(self) -> list[str]:
        """The analyses that this comparison has."""
        return list(analyses.ANALYSES) if "hdmole" in self.comparison.methods else []

    def _ready(self, name: str, seed: int) -> bool:
        """Whether a run can begin: its rate is known, and no earlier run will give the same."""
        if not self.tuned(name):
            return False
        jobs = self.comparison.jobs()
        earlier = [(n, s) for n, s in jobs[: jobs.index((name, seed))] if s == seed and self.family(n) == self.family(name)]
        settings = self.run_step(name, seed).settings
        return all(self.finished(*job) for job in earlier if self.run_step(*job).settings == settings)

    def everything(self) -> Results | None:
        """Do all tasks that are missing. The first process returns the results, others None."""
        if self.together is None:
            share(self.tasks(), self.work / "locks", self.report)
        else:
            for task in self.tasks():  # in this order each is ready when its turn comes
                if not self.first(task.finished):
                    task.run()
        return None if self.rank else self.publish()

    # -- results ------------------------------------------------------------------------------------------------------

    def publish(self) -> Results:
        """Write utterances.parquet, routing.parquet and summary.json to the results folder.

        They hold the runs that are finished. `planned` in the summary names the others.
        """
        order = self.comparison.methods
        jobs = sorted(self.comparison.jobs(), key=lambda j: (order.index(j[0]), j[1]))
        folders = {job: self.work / f"{job[0]}-{job[1]}" for job in jobs if self.finished(*job)}
        rows = pd.concat([pd.read_parquet(f / "utterances.parquet") for f in folders.values()], ignore_index=True)
        notes = {job: json.loads((f / "run.json").read_text()) for job, f in folders.items()}
        origin = provenance(
            0, self.device, base_sha256=base_digest(self.speech.base), data_sha256=self.digest,
            seeds=sorted({s for _, s in folders}), epochs=self.comparison.epochs,
            run_seconds=sum(n["seconds"] for n in notes.values()), 
            last_session_seconds=round(time.time() - self.started), config=self.comparison.text,
        )  # fmt: skip
        for field in ("machine", "device"):  # runs of one comparison may come from several machines
            counts = Counter(str(note.get(field) or getattr(origin, field)) for note in notes.values())
            told = [f"{value} ({count} runs)" for value, count in counts.items()] if len(counts) > 1 else list(counts)
            setattr(origin, field, "; ".join(told))
        results = summarise(rows, origin)
        results.planned = {name: left for name in order if (left := [s for n, s in jobs if n == name and (n, s) not in folders])}
        for name, entry in results.methods.items():
            seeds = [s for n, s in folders if n == name]
            method, note = self.methods[name], notes[name, seeds[0]]
            entry.label, entry.trainable, entry.seeds, entry.dev = method.label, note["trainable"], seeds, note.get("dev")
            if method.kind != "base":
                entry.learning_rate, entry.place = self.rate(name), method.place
            for domain, rate in entry.domains.items():
                of = rows[(rows.method == name) & (rows.domain == domain)].groupby("seed")[["errors", "words"]].sum()
                rate.per_seed = {int(str(s)): round(float(100 * r.errors / r.words), 2) for s, r in of.iterrows()}
            if self.comparison.seeds[name][0] in seeds and name in ("base", *self.comparison.watched):
                results.decoding_time[name] = self.speed(name)
        results.trials = [
            Trial(learning_rate=tried.pop("rate"), **tried) for family in self.comparison.rates for tried in self.tried(family)
        ]
        results.curves = {
            name: json.loads(f.read_text())
            for name in self.comparison.watched
            if (f := self.work / f"{name}-{self.comparison.seeds[name][0]}" / "curve.json").is_file() and name in results.methods
        }
        if self.speech.recogniser is not None:
            labels = self.speech.recogniser.labels
            heard = {
                name: analyses.recogniser_results(self.speech.corpus, labels, self.speech.recognised(name)[1])
                for name in ("", *sorted({self.methods[name].recogniser for name in results.methods}))
            }
            results.accent_recogniser = heard.pop("")
            results.other_recognisers = heard
        if self.kinds and all(map(self._is_analysed, self.kinds)):
            made = {kind: json.loads((self.analysed / f"{kind}.json").read_text()) for kind in self.kinds}
            results.routing = Routing.model_validate(made["routing"])
            results.frontier = [FrontierPoint.model_validate(point) for point in made["frontier"]]
            results.attribution = Attribution.model_validate(made["attribution"])
        results.claims = claims(results)
        save(self.out, results, rows)
        if results.routing:
            with written(self.out / "routing.parquet") as part:
                shutil.copy(self.analysed / "routing.parquet", part)
        return results


class _Clock(TrainerCallback):
    """Writes the seconds of training to a file at each checkpoint.

    `before` is the time in seconds that the run trained before it was interrupted.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.started = file, time.time()
        self.before: float = json.loads(file.read_text()) if file.is_file() else 0.0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _write(self.file, round(self.before + time.time() - self.started, 1))


class _Watch(TrainerCallback):
    """Puts the model that is trained into a list, so that it can be measured during training."""

    def __init__(self, holder: list[nn.Module]) -> None:
        self.holder = holder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.holder[:] = [kwargs["model"]]


def _finished(step: Step) -> bool:
    return step.finished


def _remove(*folders: Path) -> None:
    """Remove folders that a finished step no longer needs, such as its checkpoints."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def compare(
    config: Path, out: Path, report: Callable[[str], None], processes: int = 1, model: str = "", revision: str | None = None,
    together: bool = False, accumulation: int = 1,
) -> Results | None:  # fmt: skip
    """Run a comparison.

    Args:
        config: a TOML configuration, as `read_config` reads it.
        out: the results folder. A later call with the same folder goes on where this one stopped.
        report: called with each line about the progress.
        processes: number of processes on this machine that share the work, and its GPU if it has
            one.
        model, revision: as in `read_config`.
        together: whether the processes of `torchrun` or `accelerate launch` train each run
            together, in place of a run each. The results are those of one process, but for
            rounding, and for dropout, which is drawn anew for each part of a batch.
        accumulation: as in `hdmole.training.loop.fit`.

    Returns:
        The results in the first process, None in the others.

    Raises:
        ConfigError: the configuration cannot be used.
        ManifestError, ModelError, SpeechError: its speech or model cannot be used.
        OutputError: another comparison is writing to `out`, or the disk is full.
    """
    rank, count = rank_and_count()
    comparison = read_config(config, model, revision)
    command = ["compare", "--config", str(config), "--out", str(out), "--model", model, "--revision", revision or "",
               "--accumulation", str(accumulation)]  # fmt: skip
    if together and rank:
        report = lambda text: None  # noqa: E731
    with nullcontext() if rank else alone(out), others(command, processes if count == 1 else 1):
        speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", report, rank)
        all_ = train_together(rank, count) if together and count > 1 else None
        return Runner(comparison, out, speech, extra, report, rank, all_, accumulation).everything()
