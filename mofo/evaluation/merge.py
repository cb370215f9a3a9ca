"""Several runs as one: who is the same predictor, whether rules agree, who cannot be compared."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from mofo.evaluation.lines import Line
from mofo.evaluation.tables import Table, short

# What may differ between two rows of a set without changing a number: words, where its files lie
# (the hash tells whether the list is the same), how much is looked at, and what baselines learn.
FREE = (
    "about", "download", "licence", "source", "list", "shards", "keys", "make", "count", "limit",
    "training",
)  # fmt: skip

Scores = dict[tuple[str, str, str, str], Line]  # of one predictor: by protocol, set, list, key


def merge(runs: Mapping[str, Sequence[Line]]) -> list[Line]:
    """The lines of all runs, each with its `run`, predictors under names that are theirs alone.

    A predictor of several runs is one where weights, kind and settings are the same and so is the
    score of every image that both have: runs of different sets come together, and a baseline that
    each run scored stands once. Otherwise each has its run's name behind its own, which is kept as
    `name`.
    """
    _refuse_other_rules(line for lines in runs.values() for line in lines)
    found: dict[str, list[Scores]] = {}
    for run, lines in runs.items():
        of_predictor: dict[str, Scores] = {}
        for line in lines:
            at = (line["protocol"], line["set"], line["list_sha256"], line["key"])
            of_predictor.setdefault(line["predictor"], {})[at] = {**line, "run": run}
        for name, own in of_predictor.items():
            rivals = found.setdefault(name, [])
            known = next((known for known in rivals if _agree(known, own)), None)
            if known is None:
                rivals.append(own)
            else:
                known |= {at: line for at, line in own.items() if _adds(known.get(at), line)}
    return [
        {**line, "name": name, "predictor": name if len(rivals) == 1 else f"{name} ({_runs(own)})"}
        for name, rivals in found.items()
        for own in rivals
        for line in own.values()
    ]


def uncompared(made: Sequence[Table]) -> list[str]:
    """Why learned predictors that share a set's name do not share a table."""
    at: dict[str, dict[str, list[Table]]] = {}
    for table in made:
        for entry in table.entries if table.part is None else ():
            if not entry.is_baseline:
                at.setdefault(table.set, {}).setdefault(entry.predictor, []).append(table)
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name, of_predictor in at.items():
        for one, other in combinations(of_predictor, 2):
            if why := _obstacle(of_predictor[one], of_predictor[other]):
                sets.setdefault((one, other, why), []).append(name)
    return [
        f"{one} and {other} are not compared on {', '.join(names)}: {why}"
        for (one, other, why), names in sets.items()
    ]


def _agree(known: Scores, own: Scores) -> bool:
    """Whether both may be one predictor; an image that failed once may have a score elsewhere."""
    one, other = next(iter(known.values())), next(iter(own.values()))
    if any(one[name] != other[name] for name in ("weights", "kind", "predictor_settings")):
        return False
    both = [(known[at], own[at]) for at in known.keys() & own.keys()]
    return all(a["fits"] == b["fits"] for a, b in both if a["fits"] and b["fits"])


def _adds(known: Line | None, line: Line) -> bool:
    return known is None or (known["failed"] is not None and line["failed"] is None)


def _runs(own: Scores) -> str:
    return " + ".join(dict.fromkeys(line["run"] for line in own.values()))


def _refuse_other_rules(lines: Iterable[Line]) -> None:
    """A protocol, and a set under it, must mean the same in all runs."""
    rules: dict[tuple[str, ...], Any] = {}
    for line in lines:
        row = {name: value for name, value in line["row"].items() if name not in FREE}
        for name, rule in (
            ((line["protocol"],), line["settings"]),
            ((line["protocol"], line["set"], line["list_sha256"]), row),
        ):
            if (known := rules.setdefault(name, rule)) != rule:
                raise ValueError(
                    f"{' '.join(name[:2])} does not mean the same in all lines: "
                    f"{'; '.join(_differing(known, rule))}. Evaluate again under one version, or "
                    "report the runs one by one"
                )


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two plain structures part, such as "fits.affine.floor is 0.001 or 0.01"."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [f"{name} is {one} or {other}"]
    return [
        text
        for key in {**one, **other}
        for text in _differing(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
    ]


def _obstacle(ones: Sequence[Table], others: Sequence[Table]) -> str:
    pairs = [(one, other) for one in ones for other in others]
    if any(one is other for one, other in pairs):
        return ""
    pairs = [(one, other) for one, other in pairs if one.protocol == other.protocol]
    if not pairs:
        return f"their protocols differ, {ones[0].protocol} and {others[0].protocol}"
    if all(one.list_sha256 != other.list_sha256 for one, other in pairs):
        hashes = (short(table.list_sha256) for table in pairs[0])
        return "their lists of images differ, {} and {}".format(*hashes)
    fits = f"{_named_fits(ones)} is for one, {_named_fits(others)} for the other"
    return f"no fit of {ones[0].protocol} suits both, {fits}"


def _named_fits(made: Sequence[Table]) -> str:
    return " or ".join(dict.fromkeys(table.fit for table in made))
