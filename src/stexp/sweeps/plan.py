"""What a sweep varies: ``conf/sweep/<name>.yaml`` with the values of a command line in place of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from stexp.config.compose import parse, unquoted
from stexp.errors import InputError, did_you_mean
from stexp.files import CONF


@dataclass(frozen=True)
class Plan:
    """Axes and fixed settings of a sweep, every value as it stands on a command line.

    Parameters
    ----------
    name
        Of the sweep; None for lists of values on a command line.
    axes
        Key -> values of the trainings, besides fold and seed.
    rescored
        Key -> values for which finished trainings are retrieved again; where they differ between data sets, a dict
        of data set -> values with a ``default``.
    fixed
        Key -> value of every job.
    published
        ``"key=value key=value"`` -> overrides of the cells for which all of these hold.
    folds
        Names, or ``["all"]``, or ``["None"]`` for the first.
    test
        Sections that a fold has to hold out; None: any.
    choose_by
        Value of ``provenance.json`` by which the best cell of a fold is chosen.
    """

    name: str | None
    axes: Mapping[str, Sequence[Any]]
    rescored: Mapping[str, Any]
    fixed: Mapping[str, str]
    seeds: Sequence[str]
    folds: Sequence[str]
    published: Mapping[str, Sequence[str]] = field(default_factory=dict)
    test: Sequence[str] | None = None
    choose_by: str | None = None

    def cells(self) -> list[dict[str, str]]:
        """Every combination of the axes' values."""
        return product(self.axes)

    def published_settings(self, cell: Mapping[str, str]) -> dict[str, str]:
        """Settings that were published for a cell, besides those of its model's config."""
        settings: dict[str, str] = {}
        for condition, overrides in self.published.items():
            if all(cell.get(key) == value for key, value in (part.split("=") for part in condition.split())):
                settings |= dict(text.split("=", 1) for text in overrides)
        return settings

    def retrievals(self, data: str) -> list[dict[str, str]]:
        """Every combination of settings for which a training on `data` is retrieved again; one empty one for none."""
        return product(
            {
                key: values.get(data, values["default"]) if isinstance(values, Mapping) else values
                for key, values in self.rescored.items()
            }
        )


def sweep_names() -> list[str]:
    """The sweeps of ``conf/sweep``."""
    return [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))]


def read_plan(name: str) -> dict[str, Any]:
    """``conf/sweep/<name>.yaml`` over the one that it says it is made ``of``."""
    names = sweep_names()
    if name not in names:
        raise InputError(f"sweep={name}: choose {', '.join(names)}{did_you_mean(str(name), names)}")
    plan = OmegaConf.to_container(OmegaConf.load(CONF / "sweep" / f"{name}.yaml"))
    assert isinstance(plan, dict)
    own = {str(key): value for key, value in plan.items()}
    return {**(read_plan(own.pop("of")) if "of" in own else {}), **own}


def make_plan(name: str | None, overrides: Sequence[str] = ()) -> Plan:
    """A sweep with the values of a command line.

    Parameters
    ----------
    name
        One of :func:`sweep_names`, or None.
    overrides
        Arguments of the command line. A key that is an axis of the sweep takes the place of its values
        (``model=bleep,stnet``, ``protocol=strict``, ``fold=B4``), every other list of values is an axis of its own,
        and all else applies to every job.

    Raises
    ------
    InputError
        No such sweep, or an argument that is no value or list of values.
    """
    yaml = read_plan(name) if name else {}
    axes = {key: yaml[key] for key in ("data", "protocol", "model") if key in yaml} | yaml.get("grid", {})
    rescored = dict(yaml.get("rescore", {}))
    fixed: dict[str, str] = {}
    for override in parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
        else:
            raise InputError(f"{override.input_line}: give a list of values, choice() or range()")
        if key in rescored:
            rescored[key] = values
        elif key in axes or len(values) > 1 or key in ("seed", "fold"):
            axes[key] = values
        else:
            fixed[key] = values[0]
    seeds = axes.pop("seed", ["0"])
    if wrong := [seed for seed in seeds if not str(seed).isdigit()]:
        raise InputError(f"seed={wrong[0]}: a whole number of at least 0 would fit")
    return Plan(
        name,
        axes,
        rescored,
        fixed,
        seeds=seeds,
        folds=[unquoted(fold) for fold in axes.pop("fold", ["all" if name else "null"])],
        published=yaml.get("where", {}),
        test=yaml.get("test"),
        choose_by=yaml.get("choose_by"),
    )


def product(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, str]]:
    """Every combination of values, each as it stands on a command line."""
    return [dict(zip(axes, map(_typed, values), strict=True)) for values in itertools.product(*axes.values())]


def _typed(value: Any) -> str:
    """A value of a yaml as it stands on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
