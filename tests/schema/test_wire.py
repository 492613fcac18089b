"""What travels between the processes, written down: those of an older build live on when one of them is upgraded."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import inspect

from schema import link
from schema.link import PROTOCOL, Message

WRITTEN = Path(__file__).with_name("wire.txt")


def messages(base: type[Message] = Message) -> Iterator[type[Message]]:
    for each in base.__subclasses__():
        if each.__module__.startswith("schema."):
            yield each
        yield from messages(each)


def parts(node: object) -> Iterator[inspect.StructType | inspect.EnumType]:
    """All structs and enums in a type, itself first."""
    if isinstance(node, inspect.StructType | inspect.EnumType):
        yield node
    if isinstance(node, tuple):
        for each in node:
            yield from parts(each)
    elif isinstance(node, inspect.Type | inspect.Field):
        for name in node.__struct_fields__:
            yield from parts(getattr(node, name))


def named(node: Any) -> str:
    """A type as one writes it, with its bounds."""
    if isinstance(node, inspect.StructType | inspect.EnumType):
        return str(node.cls.__name__)
    inner = []
    for name in node.__struct_fields__:
        value = getattr(node, name)
        if value is None or value is False or value is ...:
            continue
        if isinstance(value, tuple):
            inner.append(" | ".join(named(each) if isinstance(each, inspect.Type) else repr(each) for each in value))
        else:
            inner.append(named(value) if isinstance(value, inspect.Type) else f"{name}={value!r}")
    kind = type(node).__name__.removesuffix("Type")
    return f"{kind}[{', '.join(inner)}]" if inner else kind


def described(node: inspect.StructType | inspect.EnumType) -> str:
    if isinstance(node, inspect.EnumType):
        members: list[enum.Enum] = list(node.cls)
        return f"{node.cls.__name__} = {' | '.join(repr(member.value) for member in members)}"
    how = [f"tag {node.tag}"] if node.tag is not None else []
    how += ["an array"] if node.array_like else []
    how += ["of these fields alone"] if node.forbid_unknown_fields else []
    fields = [f"  {field.encode_name}{'' if field.required else '?'}: {named(field.type)}" for field in node.fields]
    return "\n".join([f"{node.cls.__name__} ({', '.join(how)})", *fields])


def shape() -> str:
    found = {part.cls.__name__: described(part) for each in messages() for part in parts(inspect.type_info(each))}
    return "\n".join([f"protocol {PROTOCOL}", *(found[name] for name in sorted(found))]) + "\n"


def test_messages_are_those_of_this_version_of_the_protocol() -> None:
    """A process that meets a field it does not know cuts the link and dials again; one of another version is told so, and ends.

    When this fails, raise `PROTOCOL` and `PROTOCOL_OLDEST` if the version that is written down may be in use anywhere, and
    write the new shape down: ``python -m tests.schema.test_wire``.
    """
    assert shape() == WRITTEN.read_text()


def test_every_message_has_its_own_tag() -> None:
    assert issubclass(link.Progress, Message)
    tags = [each.__struct_config__.tag for each in messages()]
    assert len(set(tags)) == len(tags) > 50


if __name__ == "__main__":
    WRITTEN.write_text(shape())
