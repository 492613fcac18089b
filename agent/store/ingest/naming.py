"""A source's tensors as the model has them: under other names, or put together of several, as transformers reads them.

Checkpoints of mixtures of experts have a matrix for each expert, and the model has one of all: transformers stacks them, gate
and up of an expert one above the other. In bytes that is one after the other, so it takes no more than to read them in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.store.ingest.headers import SourceTensor
from schema.errors import InvalidCheckpoint

__all__ = ["named_as_in"]

_Parts = dict[tuple[int, str], SourceTensor]
"""By the number of the expert and the pattern of the name."""


def named_as_in(model: Any, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors by the names that a skeleton has for them. Those that it has as they are, but for a prefix, and those that
    it does not know keep theirs. Imports transformers. Raises InvalidCheckpoint for parts that do not fit together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = model.state_dict()
    prefix = model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    named: dict[str, SourceTensor] = {}
    parts: dict[str, _Parts] = {}
    for tensor in tensors.values():
        name, pattern = tensor.name, None
        if not wanted.keys() & {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}:
            name, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if name not in wanted:
                name, pattern = tensor.name, None
        beside: dict[Any, SourceTensor] = named if pattern is None else parts.setdefault(name, {})
        key = name if pattern is None else (_number(tensor.name, pattern), pattern)
        if key in beside:
            raise InvalidCheckpoint(f"tensor {tensor.name!r} is the model's {name!r}, and so is another")
        beside[key] = replace(tensor, name=name) if pattern is None else tensor
    for name, found in parts.items():
        if name in named:
            raise InvalidCheckpoint(f"tensor {name!r} is there whole and in parts")
        pattern = next(iter(found))[1]
        named[name] = _together(name, found, next(each for each in converters if pattern in each.source_patterns))
    return named


def _number(name: str, pattern: str) -> int:
    """Which expert's a tensor is: the number in the place of the pattern's star."""
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d{1,6})"), name)
    return int(found.group(1)) if found is not None and found.groups() else 0


def _together(name: str, parts: _Parts, converter: Any) -> SourceTensor:
    """All parts as one tensor [experts, their first dimensions one after the other, ...]."""
    steps = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise InvalidCheckpoint(f"tensor {name!r} is made of others by {steps}, which this ingest does not do")
    patterns = converter.source_patterns
    experts = -(-len(parts) // len(patterns))
    order = [(number, pattern) for number in range(experts) for pattern in patterns]
    missing = [pattern.replace("*", str(number)) for number, pattern in order if (number, pattern) not in parts]
    if missing:
        raise InvalidCheckpoint(f"tensor {name!r} is put together of the experts', of which {missing[0]!r} is missing")
    each = tuple(parts[key] for key in order)
    first = each[0]
    for at, part in enumerate(each):
        alike = each[at % len(patterns)]
        if part.dtype != first.dtype or part.shape != alike.shape or not part.shape or part.shape[1:] != first.shape[1:]:
            fits = f"does not fit {first.dtype} {first.shape} of {first.name!r}"
            raise InvalidCheckpoint(f"tensor {part.name!r} is {part.dtype} {part.shape}, which {fits}")
    shape = (experts, sum(part.shape[0] for part in each[: len(patterns)]), *first.shape[1:])
    return SourceTensor(name, first.dtype, shape, first.file, 0, sum(part.size_bytes for part in each), parts=each)
