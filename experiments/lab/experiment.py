"""Experiments are modules; this finds them, imports them and checks that they are whole.

``experiments/sharing/robe.py`` is the experiment ``sharing.robe`` if it defines ``CLAIMS`` and ``run``.
It also has ``PAPER`` (the citation), ``SYSTEM`` (the module of the library that it exercises), ``Config``
(a frozen dataclass), ``SCALES`` (``Config`` values by scale) and ``figure``; ``table`` and ``count`` are
optional. The first line of its docstring is its title.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import polars as pl
from matplotlib.figure import Figure

from experiments.lab.claims import Claim
from experiments.lab.errors import UserError
from experiments.lab.trial import Trial

Scale = Literal["tiny", "default", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
"""``tiny`` takes seconds and is not judged; ``default`` is the claim on two cores in minutes; ``paper`` is
the paper's own data and sizes."""

RESERVED = frozenset({"name", "scale", "out", "fresh"})
"""Options of the command line itself; no field of a Config is called so."""

NOT_FAMILIES = frozenset({"lab", "data", "results"})
"""Folders of the package that hold no experiments."""


@dataclass(frozen=True)
class Experiment:
    """What a module offers, checked by `from_module`."""

    name: str
    """``family.module``, as on the command line."""
    title: str
    description: str
    paper: str
    system: str
    scales: Mapping[str, Any]
    """The module's ``Config`` values, by scale, in the order of `SCALES`."""
    run: Callable[[Any], Iterator[Trial]]
    claims: tuple[Claim, ...]
    figure: Callable[[pl.DataFrame], Figure]
    table: Callable[[pl.DataFrame], pl.DataFrame] | None
    count: Callable[[Any], int] | None
    """Number of trials of a config, for the progress bar."""

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]


class UnknownExperiment(UserError):
    """No module of that name is an experiment."""


class BrokenExperiment(UserError):
    """A module cannot be imported, or lacks a part."""


def module_names(package: str = "experiments") -> list[str]:
    """The modules ``family.module`` under the package, sorted; experiments or not, none imported."""
    root = importlib.import_module(package)
    names: list[str] = []
    for family in pkgutil.iter_modules(root.__path__):
        if not family.ispkg or family.name in NOT_FAMILIES:
            continue
        folders = [f"{path}/{family.name}" for path in root.__path__]
        names += [f"{family.name}.{m.name}" for m in pkgutil.iter_modules(folders) if not m.ispkg]
    return sorted(names)


def load(name: str, package: str = "experiments") -> Experiment:
    """Import one experiment.

    Raises:
        UnknownExperiment: naming those that are spelled alike.
        BrokenExperiment: where the module cannot be imported or lacks a part.
    """
    names = module_names(package)
    module = _import(name, package) if name in names else None
    if module is None or not is_experiment(module):
        raise UnknownExperiment(f"no experiment is called {name!r}{_alike(name, names)}")
    return from_module(name, module)


def discover(package: str = "experiments") -> tuple[list[Experiment], dict[str, str]]:
    """All experiments, and the modules that cannot be used, each with the reason."""
    found: list[Experiment] = []
    broken: dict[str, str] = {}
    for name in module_names(package):
        try:
            module = _import(name, package)
            if is_experiment(module):
                found.append(from_module(name, module))
        except BrokenExperiment as error:
            broken[name] = str(error)
    return found, broken


def is_experiment(module: ModuleType) -> bool:
    """Whether the module defines ``CLAIMS`` and ``run``."""
    return hasattr(module, "CLAIMS") and hasattr(module, "run")


def from_module(name: str, module: ModuleType) -> Experiment:
    """Check a module's parts and gather them.

    Raises:
        BrokenExperiment: naming the first part that is missing or wrong.
    """

    def part(attribute: str, what: str, right: Callable[[Any], bool]) -> Any:
        value = getattr(module, attribute, None)
        if not right(value):
            raise BrokenExperiment(f"{name}: {attribute} must be {what}, got {value!r}")
        return value

    def optional(attribute: str) -> Any:
        return part(attribute, "a function or absent", lambda f: f is None or callable(f))

    description = inspect.cleandoc(module.__doc__ or "")
    if not description:
        raise BrokenExperiment(f"{name}: the module needs a docstring; its first line is the title")
    config = part("Config", "a frozen dataclass", _is_frozen_dataclass)
    taken = RESERVED & {field.name for field in dataclasses.fields(config)}
    if taken:
        raise BrokenExperiment(f"{name}: a field of Config must not be called {min(taken)}, an option of run")
    scales = part(
        "SCALES",
        f"a dict from 'default' and others of {SCALES} to Config values",
        lambda s: (
            isinstance(s, dict)
            and "default" in s
            and set(s) <= set(SCALES)
            and all(isinstance(c, config) for c in s.values())
        ),
    )
    claims = part(
        "CLAIMS",
        "a tuple of Claim with unique ids",
        lambda cs: (
            isinstance(cs, tuple) and all(isinstance(c, Claim) for c in cs) and len({c.id for c in cs}) == len(cs)
        ),
    )
    return Experiment(
        name=name,
        title=description.splitlines()[0].strip(),
        description=description,
        paper=part("PAPER", "the citation", lambda s: isinstance(s, str) and bool(s)),
        system=part("SYSTEM", "the library module it exercises", lambda s: isinstance(s, str) and bool(s)),
        scales={scale: scales[scale] for scale in SCALES if scale in scales},
        run=part("run", "a function", callable),
        claims=claims,
        figure=part("figure", "a function of the rows", callable),
        table=optional("table"),
        count=optional("count"),
    )


def _is_frozen_dataclass(value: Any) -> bool:
    return inspect.isclass(value) and dataclasses.is_dataclass(value) and _parameters(value).frozen


def _parameters(value: Any) -> Any:
    """The arguments that ``@dataclass`` was given."""
    return value.__dataclass_params__


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(f"{package}.{name}")
    except Exception as error:  # a broken module must not take the others with it
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} (at {where.filename}:{where.lineno})"
        raise BrokenExperiment(f"{name} cannot be imported: {reason}") from error


def _alike(name: str, names: list[str]) -> str:
    """A hint that names the experiments whose own name, the family apart, is close."""

    def closeness(full: str) -> float:
        return difflib.SequenceMatcher(None, name.rpartition(".")[2], full.rpartition(".")[2]).ratio()

    close = [full for full in sorted(names, key=closeness, reverse=True) if closeness(full) > 0.6 and full != name]
    meant = f"; did you mean {' or '.join(close[:3])}?" if close else ""
    return f"{meant} (python -m experiments list shows them all)"
