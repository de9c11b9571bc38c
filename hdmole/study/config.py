"""The configuration of a comparison: a TOML file and the methods it can name."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hdmole.errors import UserError
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models.family import family
from hdmole.speech.loading import find_model
from hdmole.speech.loading import read_config as read_model
from hdmole.training.adapt import MIXTURES, Adaptation, AdaptationError, mixture_config


class ConfigError(UserError):
    """A configuration that cannot be used, or results that no longer fit it.

    The codes begin with `config.`.
    """


# How the methods that the paper compares with, and later ones, differ from HDMoLE (docs/method.md).
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "mole": ("MoLE", {"routing": "local", "thresholds": "dense"}),
    "moral": ("MoRAL", {"routing": "local", "thresholds": "top_k", "top_k": 2}),
    "loramoe": ("LoRAMoE", {"routing": "local", "thresholds": "dense", "auxiliary_loss": "balance"}),
    "moa": ("MoA", {"routing": "local", "thresholds": "dense", "auxiliary_loss": "accent"}),
    "adamole": (
        "AdaMoLE",
        {
            "routing": "local", "thresholds": "relu", "threshold_parametrisation": "input", "threshold_max": 1.0,
            "threshold_init": 0.5,
        },
    ),
    "ldmole": ("LD-MoLE", {"routing": "local", "thresholds": "sparsegen", "threshold_parametrisation": "input"}),
}  # fmt: skip
RANKS = (2, 4, 8, 16, 32)


def known_methods(
    hdmole: dict[str, Any], place: str = "projector", extended: dict[str, Any] | None = None
) -> dict[str, Adaptation]:
    """The methods that a configuration can name.

    The rank "equal" stands for the rank at which LoRA trains as many parameters as HDMoLE.

    Args:
        hdmole: what the paper's method and the other routers share: arguments of `HDMoLEConfig`,
            and `threshold_rate` and `router_rate` of `Adaptation`.
        place: the part of the model that is adapted: projector, encoder or llm.
        extended: the same for this project's variant: arguments of `HDMoLEConfig.extended`, and the
            two rates.
    """
    method = partial(Adaptation, place=place)
    options, rates = _apart(hdmole)
    ours, our_rates = _apart(extended or {})
    r = options.get("r", HDMoLEConfig.r)

    def paper(label: str, switches: dict[str, Any] | None = None, **more: Any) -> Adaptation:
        return method(label, "hdmole", {**options, **(switches or {})}, **rates, **more)

    shared = {"shared_expert_rank": r, "shared_expert_weight": "entropy"}
    by_accent: dict[str, Any] = {"train_with": "accent"}
    return {
        "base": Adaptation("Frozen base", "base"),
        "full": method("Full fine-tuning", "full"),
        "lora_r": method(f"LoRA, rank {r}", "lora", {"r": r}),
        "lora": method("LoRA, equal parameters", "lora", {"r": "equal"}),
        **{name: paper(label, of, **(by_accent if "auxiliary_loss" in of else {})) for name, (label, of) in BASELINES.items()},
        "ear": paper("EAR", {"routing": "global", "thresholds": "dense", **shared}, **by_accent),
        "hdmole": paper("HDMoLE"),
        "no_thresholds": paper("HDMoLE, without thresholds", {"thresholds": "dense"}),
        "no_local": paper("HDMoLE, without local routing", {"routing": "global"}),
        "no_global": paper("HDMoLE, without global routing", {"routing": "local"}),
        "extended": method("HDMoLE, extended", "extended", ours, **our_rates),
        "gated_lora": method("LoRA times accent mass", "gated_lora", {"r": "equal"}),
        "recogniser_early": paper("HDMoLE, recogniser not converged", rate="hdmole", recogniser="early"),
        "true_accent": paper("HDMoLE, true accent", rate="hdmole", true_accent=True),
        "recogniser_better": paper("HDMoLE, better recogniser", rate="hdmole", recogniser="better"),
        **{f"rank{k}": paper(f"HDMoLE, rank {k}", {"r": k}, rate="hdmole") for k in RANKS},
        "by_accent": paper("HDMoLE, experts trained with the true accent", **by_accent),
        "merged": paper("HDMoLE, one LoRA per accent first", warm_share=0.5),
        "shared": paper("HDMoLE, shared expert", shared),
        "muon": paper("HDMoLE, Muon", muon=True),
        "lora_muon": method("LoRA, equal parameters, Muon", "lora", {"r": "equal"}, muon=True),
        "full_muon": method("Full fine-tuning, Muon", "full", muon=True),
    }


def _apart(shared: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a configuration of the method, and the learning rates among them."""
    rates: dict[str, Any] = {name: shared[name] for name in ("threshold_rate", "router_rate") if name in shared}
    return {name: value for name, value in shared.items() if name not in rates}, rates


@dataclass(frozen=True)
class Comparison:
    """A comparison as its configuration describes it.

    Args:
        data: work folder of `hdmole demo build`, or None.
        model: folder of the model, or None.
        manifests: manifest of each split, if there is no `data`.
        known: all methods that the configuration can name.
        methods: the methods that are compared, "base" first.
        seeds: training seeds of each method.
        epochs: passes over the training speech in each run.
        rates: learning rates to try, by method.
        trial_epochs: passes over the training speech in each trial of a learning rate.
        watched: methods whose word error rate on dev speech is measured during training.
        text: content of the configuration file.
    """

    data: Path | None
    model: Path | None
    manifests: dict[str, Path]
    known: dict[str, Adaptation]
    methods: list[str]
    seeds: dict[str, list[int]]
    epochs: float
    rates: dict[str, list[float]]
    trial_epochs: float
    watched: list[str]
    text: str = field(repr=False, default="")

    def jobs(self) -> list[tuple[str, int]]:
        """Method and seed of every run. The first seeds of all methods come first."""
        pairs = [(name, seed) for name in self.methods for seed in self.seeds[name]]
        return sorted(pairs, key=lambda p: self.seeds[p[0]].index(p[1]))


def read_config(path: Path, model: str = "", revision: str | None = None) -> Comparison:
    """Read a TOML configuration. runs/paper.toml is an example; docs/compare.md explains every
    line.

    Args:
        path: the file.
        model: a model in place of the one that the file names, as in `find_model`.
        revision: branch, tag or commit of a repository on the hub.

    Raises:
        ConfigError: the file is missing or not TOML, or a line of it cannot be used.
        ModelError: there is no such model.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError:
        raise ConfigError(
            "config.absent", "There is no configuration {name}; runs/paper.toml in the repository is an example.", name=path
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("config.not_toml", "{name} is not valid TOML: {reason}.", name=path.name, reason=error) from None
    allowed = {
        "data", "model", "manifests", "place", "methods", "seeds", "seeds_of", "epochs", "rates", "trial_epochs", "watched", "hdmole",
        "extended", "method",
    }  # fmt: skip
    if unknown := sorted(set(values) - allowed):
        raise ConfigError(
            "config.unknown_line",
            "{name} has {unknown}, which is not known; the lines are {lines}.",
            name=path.name,
            unknown=", ".join(unknown),
            lines=", ".join(sorted(allowed)),
        )
    if ("data" in values) == ("manifests" in values):
        raise ConfigError(
            "config.no_speech",
            "{name} needs either data (a work folder of 'hdmole demo build') or manifests, not both.",
            name=path.name,
        )
    named = values.get("model", "")
    _expect(isinstance(named, str), path, "model", named, "not_a_path", "a path or a name in quotes")
    used = _model(model, Path(), revision) or _model(named, path.parent, revision)
    try:
        place = values.get("place") or _first_place(used)
        methods = known_methods(_table(values, "hdmole", path), place, _table(values, "extended", path))
        for name, entry in _table(values, "method", path).items():
            methods[name] = Adaptation(**{"label": name, "place": place, **entry})
        for method in methods.values():
            options = dict(method.options)
            if method.kind in MIXTURES:
                mixture_config(method, ["any"])
            elif method.kind in ("lora", "gated_lora"):
                rank = options.pop("r", None)
                if rank != "equal" and (not isinstance(rank, int) or rank < 1):
                    sentence = '{label} needs options.r, a rank from 1 or "equal"'
                    raise AdaptationError("adaptation.no_rank", sentence, label=method.label)
                (LoraConfig if method.kind == "lora" else partial(HDMoLEConfig.extended, ["any"]))(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "config.bad_method",
            "{name} describes a method that cannot be: {reason}.",
            name=path.name,
            reason=str(error).rstrip("."),
        ) from None
    lists = {
        name: values.get(name, default)
        for name, default in (("methods", ["full", "lora", "gated_lora", "hdmole"]), ("watched", []))
    }
    for name, value in lists.items():
        right = isinstance(value, list) and all(isinstance(v, str) for v in value)
        _expect(right, path, name, value, "not_names", 'a list of names in quotes, such as ["full", "hdmole"]')
    chosen, watched = list(dict.fromkeys(["base", *lists["methods"]])), lists["watched"]
    if wrong := [name for name in [*chosen, *watched] if name not in methods]:
        raise ConfigError(
            "config.no_such_method",
            "{name} names {wrong}; the methods are {methods}.",
            name=path.name,
            wrong=", ".join(wrong),
            methods=", ".join(methods),
        )
    seeds = _seeds(values.get("seeds", [0]), "seeds", path)
    own = values.get("seeds_of", {})
    if not isinstance(own, dict) or set(own) - set(methods):
        raise ConfigError(
            "config.bad_seeds_of",
            "{name}: seeds_of is a table of seeds by method; the methods are {methods}.",
            name=path.name,
            methods=", ".join(methods),
        )
    seeds_of = {name: _seeds(own.get(name, seeds), f"seeds_of.{name}", path) for name in chosen} | {"base": seeds[:1]}
    rates = {family: _rates(tried, family, path) for family, tried in _table(values, "rates", path).items()}
    for name in chosen:
        family = methods[name].rate or name
        if methods[name].kind != "base" and not rates.get(family):
            raise ConfigError(
                "config.no_rates",
                "{name} has no learning rates to try for {family}; add rates.{family} = [...].",
                name=path.name,
                family=family,
            )
    if wrong := [family for family in rates if family not in methods]:
        raise ConfigError(
            "config.rates_of_no_method",
            "{name} has learning rates for {wrong}; the methods are {methods}.",
            name=path.name,
            wrong=", ".join(wrong),
            methods=", ".join(methods),
        )
    if len({len(v) for v in rates.values()}) > 1:
        raise ConfigError(
            "config.uneven_rates",
            "{name} tries more learning rates for one method than for another; give each as many.",
            name=path.name,
        )
    manifests = _table(values, "manifests", path)
    for name, value in {"data": values.get("data", ""), **manifests}.items():
        _expect(isinstance(value, str), path, name, value, "not_a_path", "a path in quotes")
    where = path.parent
    return Comparison(
        data=_path(values.get("data"), where), model=used,
        manifests={k: where / v for k, v in manifests.items()},
        known=methods, methods=chosen, seeds=seeds_of, epochs=_positive(values.get("epochs", 1), "epochs", path), rates=rates,
        trial_epochs=_positive(values.get("trial_epochs", 0.5), "trial_epochs", path),
        watched=[n for n in watched if n in chosen], text=text,
    )  # fmt: skip


def _first_place(model: Path | None) -> str:
    """Where methods are put if the configuration does not say it: the projector, or the encoder
    without one.
    """
    if model is None:
        return "projector"
    return next(iter(family(read_model(model)["model_type"]).places))


def _expect(right: bool, path: Path, line: str, value: Any, code: str, wanted: str) -> None:
    """Raise ConfigError unless the value of a line is right."""
    if not right:
        sentence = "{name}: {line} is {wanted}; not {value}."
        raise ConfigError(f"config.{code}", sentence, name=path.name, line=line, wanted=wanted, value=repr(value))


def _table(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = values.get(name, {})
    _expect(isinstance(found, dict), path, name, found, "not_a_table", f"a table, [{name}] with one line a name")
    return dict(found)


def _positive(value: Any, name: str, path: Path) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    _expect(right, path, name, value, "not_positive", "a number above 0")
    return float(value)


def _seeds(value: Any, name: str, path: Path) -> list[int]:
    right = (
        isinstance(value, list) and value != [] and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in value)
    )
    wanted = "a list of different whole numbers from 0, such as [0, 1, 2]"
    _expect(right and len(set(value)) == len(value), path, name, value, "not_seeds", wanted)
    return list(value)


def _rates(value: Any, family: str, path: Path) -> list[float]:
    line, wanted = f"rates.{family}", "a list of learning rates, such as [1e-3, 2e-3]"
    _expect(isinstance(value, list) and value != [], path, line, value, "not_rates", wanted)
    return list(dict.fromkeys(_positive(rate, f"each of {line}", path) for rate in value))


def _model(name: str, where: Path, revision: str | None) -> Path | None:
    """The folder of a model that is named as in `find_model`, or by a path relative to `where`;
    None for no name.
    """
    return find_model(where / name if name and (where / name).is_dir() else name, revision) if name else None


def _path(value: str | None, where: Path) -> Path | None:
    """A path relative to the working directory if it exists there, otherwise to `where`."""
    if value is None:
        return None
    return Path(value) if Path(value).exists() else where / value
