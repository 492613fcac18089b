"""A scenario from its file or from those that are shipped: read, normalised, changed by assignments, checked.

Values of keys in ``_bytes``, ``_bps`` and ``_s`` may be written with units (``48 GB``, ``10 Gbps``, ``3 ms``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import yaml

from schema.errors import InvalidInput, NotFound
from sllmctl.simulate.check import Fault, check
from sllmctl.simulate.parts import Arrival, Lengths, ModelGroup, NodeGroup, Popularity, Scenario, Speed, Workload
from sllmctl.simulate.sizes import read_bytes, read_rate, read_seconds
from sllmctl.simulate.trace import find

__all__ = [
    "Arrival",
    "Lengths",
    "ModelGroup",
    "NodeGroup",
    "Popularity",
    "Scenario",
    "Speed",
    "Workload",
    "load_scenario",
    "override",
    "shipped_scenarios",
]

_MOST_FILE_BYTES = 4 << 20
_READERS = {"_bytes": read_bytes, "_bps": read_rate, "_s": read_seconds}
_MOST_VALUES = 1_000_000
_STEP = re.compile(r"(?:^|\.)([A-Za-z_][A-Za-z0-9_]*)|\[([0-9]{1,6})\]")


def shipped_scenarios() -> list[str]:
    """The names of the scenarios that come with the simulator."""
    folder = resources.files("sllmctl.simulate").joinpath("scenarios")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_scenario(path_or_name: str | Path) -> Scenario:
    """A checked scenario from a YAML file, or from one that is shipped, by its name.

    Raises NotFound if there is neither, InvalidInput naming file, key and reason if it is no good.
    """
    text, source, folder = _text(path_or_name)
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader that refuses keys given twice
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark is not None else source
        raise InvalidInput(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError:
        raise InvalidInput(f"{source}: too deeply nested to be a scenario") from None
    return _checked(value, source, folder)


def override(scenario: Scenario, assignments: Sequence[str]) -> Scenario:
    """The scenario with assignments such as ``workload.rate=1.4`` or ``models[0].count=64`` made, checked as a file is.

    What stands right of ``=`` is YAML. Raises InvalidInput.
    """
    # Through JSON, for lists in the place of tuples: they are assigned to.
    value = msgspec.json.decode(msgspec.json.encode(scenario))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise InvalidInput(f"{assignment!r} is no assignment; write KEY=VALUE, such as workload.rate=1.4")
        try:
            new = yaml.load(text, Loader=_Loader)  # noqa: S506 - as above
        except yaml.YAMLError as error:
            raise InvalidInput(f"{assignment}: the value is not YAML", key) from error
        _assign(value, key.strip(), new)
    return _checked(value, f"{scenario.name} with {', '.join(assignments)}" if assignments else scenario.name, Path.cwd())


def _text(path_or_name: str | Path) -> tuple[str, str, Path]:
    """A scenario's text, what to call it, and the folder its other files are looked for in."""
    path = Path(path_or_name)
    try:
        if path.is_file():
            if path.stat().st_size > _MOST_FILE_BYTES:
                raise InvalidInput(f"{path}: more than {_MOST_FILE_BYTES >> 20} MiB is no scenario")
            return path.read_text(encoding="utf-8"), str(path), path.parent
        name = str(path_or_name)
        if name in shipped_scenarios():
            file = resources.files("sllmctl.simulate").joinpath("scenarios", f"{name}.yaml")
            return file.read_text(encoding="utf-8"), f"{name}.yaml", Path.cwd()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}") from error
    raise NotFound(f"{path_or_name} is no file, and no shipped scenario; those are {', '.join(shipped_scenarios())}")


def _checked(value: Any, source: str, folder: Path) -> Scenario:
    try:
        scenario = msgspec.convert(_normal(value, "", count()), Scenario)
        scenario = _with_files(scenario, folder)
        check(scenario)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        key = place.rstrip("`").removeprefix(".")
        raise InvalidInput(f"{source}: {key}: {reason}" if key else f"{source}: {reason}", key or None) from error
    except Fault as fault:
        raise InvalidInput(f"{source}: {fault}", fault.key) from fault
    except RecursionError:
        raise InvalidInput(f"{source}: an alias stands within what it names") from None
    return scenario


def _normal(value: Any, key: str, numbers: Iterator[int]) -> Any:
    """Units read, whole numbers made integers; the same in everything below. ``numbers`` counts the values."""
    if next(numbers) > _MOST_VALUES:
        # A few aliases of aliases make billions.
        raise Fault(key, f"more than {_MOST_VALUES:,} values are no scenario")
    if isinstance(value, dict):
        return {name: _normal(item, f"{key}.{name}" if key else str(name), numbers) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item, f"{key}[{number}]", numbers) for number, item in enumerate(value)]
    if isinstance(value, str):
        for suffix, read in _READERS.items():
            if key.endswith(suffix):
                try:
                    value = read(value)
                except ValueError as error:
                    raise Fault(key, str(error)) from error
                break
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Fault(key, f"{value} is no number to count with")
        # YAML's 4.8e+10 is a float, also where a count is wanted.
        return int(value) if value.is_integer() else value
    return value


def _with_files(scenario: Scenario, folder: Path) -> Scenario:
    """Its trace and counts named so that they are found from anywhere."""
    workload = scenario.workload
    for key in ("trace", "counts"):
        name = getattr(workload, key)
        if name is None:
            continue
        found = find(name, folder)
        if found is None:
            raise Fault(f"workload.{key}", f"there is no file {name} in {folder.resolve()}, and none of that name is shipped")
        workload = msgspec.structs.replace(workload, **{key: found})
    return msgspec.structs.replace(scenario, workload=workload)


def _assign(value: Any, key: str, new: Any) -> None:
    """Set one key of a nest of dicts and lists; a parent that is not there yet (None or absent) becomes a dict."""
    steps = [name or int(number) for name, number in _STEP.findall(key)]
    if not steps or "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".") != key:
        raise InvalidInput(f"{key!r} is no key; write one such as workload.rate or models[0].count", key)
    *parents, last = steps
    for step in parents:
        value = _item(value, step, key)
    if isinstance(last, str) and isinstance(value, dict):
        value[last] = new
    else:
        _item(value, last, key)
        value[last] = new


def _item(value: Any, step: str | int, key: str) -> Any:
    if isinstance(step, int):
        if not isinstance(value, list):
            raise InvalidInput(f"{key}: there is no list to take [{step}] of", key)
        if step >= len(value):
            raise InvalidInput(f"{key}: [{step}] is beyond the end, there are {len(value)}", key)
        return value[step]
    if not isinstance(value, dict):
        raise InvalidInput(f"{key}: there is nothing to take .{step} of", key)
    if value.get(step) is None:
        value[step] = {}
    return value[step]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last; 1e-3 is a number, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
