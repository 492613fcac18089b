"""What the two OpenAI endpoints have in common: decoding a body, refusing parameters by name, sampling parameters.

A parameter is in one of three groups: honoured (a field of the body's struct), known to OpenAI's API but not honoured (then
only values that ask for nothing are taken, since clients send them routinely), or unknown.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from schema.errors import ContextOverflow, InvalidInput
from schema.link import SamplingParams
from schema.sampling import most_scored_tokens
from sllmctl.gateway.errors import UnknownParameter, UnsupportedParameter
from sllmctl.gateway.generate import Job
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.sse import Shape
from sllmctl.gateway.text import TextModel, context_holds

__all__ = ["BodyDecoder", "Common", "StreamOptions", "check_stream_options", "make_job", "stop_strings"]

_SEED_MASK = (1 << 63) - 1


_Key = Annotated[str, Meta(max_length=64)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_obfuscation`` would pad events against traffic analysis; it can only be declined."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of both endpoints; ranges that are not given here are those of `SamplingParams.check`.

    Those of one ``user`` take turns with those of others, and share no cached prefix with them. ``metadata`` is accepted and
    has no effect, since no reply is stored. ``min_p``, ``top_k``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos`` and
    ``stop_token_ids`` are not OpenAI's, but named as other servers name them.
    """

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    metadata: Annotated[dict[_Key, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None


B = TypeVar("B", bound=Common)

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_any = msgspec.json.Decoder()


class BodyDecoder(Generic[B]):
    """Decodes bodies of one kind. ``neutral``: OpenAI's other parameters, each with the values that ask for nothing."""

    def __init__(self, kind: type[B], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._fields = frozenset(field.encode_name for field in msgspec.structs.fields(kind))
        self._neutral = neutral

    @property
    def also(self) -> dict[str, dict[str, Any]]:
        """The JSON Schemas of OpenAI's other parameters, as far as they are taken."""
        return {name: {"enum": [None, *values]} for name, values in self._neutral.items()}

    def decode(self, data: bytes) -> B:
        """The body. Raises InvalidInput, UnsupportedParameter or UnknownParameter, naming the parameter at fault."""
        try:
            members = _members.decode(data)
            for name, raw in members.items():
                if name not in self._fields:
                    self._refuse(name, _any.decode(raw))
            return self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise _named(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the request's body is not valid JSON: {error}") from error
        except RecursionError as error:
            raise InvalidInput("the request's body is nested too deeply") from error

    def _refuse(self, name: str, value: Any) -> None:
        allowed = self._neutral.get(name)
        if allowed is None:
            raise UnknownParameter(f"unknown parameter {name[:128]!r}", name[:128])
        if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            return
        only = f" (other than {', '.join(msgspec.json.encode(each).decode() for each in allowed)})" if allowed else ""
        raise UnsupportedParameter(f"parameter {name!r} is not supported by this server{only}", name)


def _named(message: str) -> InvalidInput:
    """The error for a value of the wrong type or range, with the place that msgspec names as ``param``."""
    text, _, path = message.partition(" - at `")
    path = path.removeprefix("key` in `").removeprefix("value` in `")
    path = path.removesuffix("`").removeprefix("$").removeprefix(".")
    if match := re.search(r"(missing required|contains unknown) field `([^`]*)`", text):
        path = f"{path}.{match.group(2)}" if path else match.group(2)
        if match.group(1) == "contains unknown":
            return UnknownParameter(f"unknown parameter {path!r}", path)
        return InvalidInput(f"parameter {path!r} is required", path)
    if not path:
        return InvalidInput(f"the request's body must be a JSON object: {text}")
    return InvalidInput(f"{path}: {text}", path)


def check_stream_options(body: Common) -> bool:
    """Whether usage is to be sent at the end of a stream. Raises InvalidInput for options without a stream."""
    if body.stream_options is None:
        return False
    if not body.stream:
        raise InvalidInput("stream_options is only allowed with stream: true", "stream_options")
    if body.stream_options.include_obfuscation:
        raise UnsupportedParameter(
            "parameter 'stream_options.include_obfuscation' is not supported by this server (other than false)",
            "stream_options.include_obfuscation",
        )
    return bool(body.stream_options.include_usage)


def stop_strings(body: Common, settings: GatewaySettings) -> tuple[str, ...]:
    """The stop strings. Raises InvalidInput when they are empty, too many or too long."""
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > settings.stop_strings_limit:
        raise InvalidInput(f"stop: {len(stops)} strings; at most {settings.stop_strings_limit} are allowed", "stop")
    for stop in stops:
        if not 0 < len(stop) <= settings.stop_chars_limit:
            raise InvalidInput(f"stop: a string must have 1 to {settings.stop_chars_limit} characters", "stop")
    return stops


def make_job(
    body: Common,
    text: TextModel,
    prompt: Sequence[int],
    context_tokens: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    stops: tuple[str, ...],
    include_usage: bool,
    shape: type[Shape],
    where: str,
) -> Job:
    """The job of a body whose prompt was made tokens; ``where`` names the parameter that a prompt came in.

    Raises ContextOverflow when prompt and reply do not fit, InvalidInput for what is out of range.
    """
    try:
        params = _sampling_params(body, text, len(prompt), context_tokens, max_tokens, logprobs)
    except ContextOverflow as error:
        raise ContextOverflow(error.message, error.param or where) from error
    return Job(
        model=body.model,
        text=text,
        prompt=tuple(prompt),
        params=params,
        choices=body.n or 1,
        tenant=body.user or "",
        stops=stops,
        stream=bool(body.stream),
        include_usage=include_usage,
        shape=shape,
    )


def _sampling_params(
    body: Common,
    text: TextModel,
    prompt_tokens: int,
    context_tokens: int,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """How tokens are chosen: by the body, else by the model's own defaults, else by OpenAI's.

    Without ``max_tokens`` the reply may fill the context, as far as log-probabilities that were asked for can be told. Raises
    ContextOverflow when prompt and reply do not fit, InvalidInput for what is out of range.
    """
    defaults = text.defaults
    room = context_tokens - prompt_tokens
    if room < 1:
        raise ContextOverflow(f"the prompt has {prompt_tokens} tokens; {context_holds(context_tokens)}; shorten it")
    if max_tokens is not None and max_tokens > room:
        raise ContextOverflow(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} were asked for; {context_holds(context_tokens)}; "
            f"ask for at most {room}",
            "max_tokens",
        )
    longest = room if logprobs is None else min(room, most_scored_tokens(logprobs))
    if (body.min_tokens or 0) > (max_tokens or longest):
        most = f"max_tokens, {max_tokens}" if max_tokens is not None else f"the {longest} that there is room for"
        raise InvalidInput(f"min_tokens: {body.min_tokens} is more than {most}", "min_tokens")
    stop_token_ids = (*(body.stop_token_ids or ()), *(() if body.ignore_eos else defaults.stop_token_ids))
    logit_bias = tuple((body.logit_bias or {}).items())
    _check_tokens("stop_token_ids", body.stop_token_ids or (), text.vocab_size)
    _check_tokens("logit_bias", body.logit_bias or (), text.vocab_size)
    params = SamplingParams(
        max_tokens=max_tokens or longest,
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        seed=secrets.randbits(63) if body.seed is None else body.seed & _SEED_MASK,
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        min_tokens=body.min_tokens or 0,
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        logprobs=logprobs,
    )
    params.check()
    return params


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidInput(f"{name}: there is no token id {token} in the vocabulary of {vocabulary}", name)


N = TypeVar("N", int, float)


def _first(asked: N | None, default: N | None, otherwise: N) -> N:
    if asked is not None:
        return asked
    return otherwise if default is None else default
