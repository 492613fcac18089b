"""Fetches a model of a Hugging Face hub into a directory, only the files that ingest reads."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.store.durable import disk_errors
from agent.store.ingest.files import PLAIN_NAME
from schema.errors import InvalidCheckpoint, InvalidInput, NotFound, OutOfSpace, Unauthorised, Unreachable
from schema.spec import HubSource

__all__ = ["fetch"]

_SAFETENSORS: Final = ("model*.safetensors", "model.safetensors.index.json")
_PICKLED: Final = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_WANTED: Final = (
    "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
_LOOK_S: Final = 0.2
_log = logging.getLogger(__name__)


class _File(msgspec.Struct):
    rfilename: str
    size: Annotated[int, Meta(ge=0)] | None = None


class _Model(msgspec.Struct):
    """What a hub says of a model, as far as it is used."""

    sha: str | None = None
    siblings: tuple[_File, ...] | None = None


def fetch(source: HubSource, directory: Path, progress: Callable[[int, int], None], free: Callable[[int], int]) -> None:
    """Download a model's revision into ``directory``; ``progress`` hears (done, total) bytes. HF_ENDPOINT names the hub.

    Raises NotFound for an unknown model or revision, InvalidInput for a name that no model can have, Unauthorised for a gated
    one, Unreachable when the hub does not answer, or not as a hub does, OutOfSpace before the download when the disk has no
    room, InvalidCheckpoint when the model has no weights that are read. Pickled weights are fetched only where there are no
    others. ``free`` says how many bytes the disk has, if that many are needed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # standard error is the ingest's log
    what = f"{source.repo} at {source.revision}"
    model = _ask(source, what)
    there = {each.rfilename: each.size or 0 for each in model.siblings or () if PLAIN_NAME.fullmatch(each.rfilename)}
    weights = next((kind for kind in (_SAFETENSORS, _PICKLED) if any(_matches(name, kind[:1]) for name in there)), None)
    if weights is None:
        raise InvalidCheckpoint(f"{what} has neither model*.safetensors nor pytorch_model*.bin")
    sizes = {name: size for name, size in there.items() if _matches(name, (*_WANTED, *weights))}
    total = sum(sizes.values())
    lie = _directory_bytes(directory)
    if (room := free(total - lie) + lie) < total:
        raise OutOfSpace(f"{what} has {total} bytes; {directory} has {room} free: {total - room} are missing")
    with disk_errors(f"fetching {what}", directory, total), _Watch(directory, total, progress), _client_errors(what):
        snapshot_download(source.repo, revision=model.sha or source.revision, local_dir=directory, allow_patterns=list(sizes))


def _ask(source: HubSource, what: str) -> _Model:
    from huggingface_hub import HfApi

    try:
        with _client_errors(what):
            info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        return msgspec.convert(info, _Model, from_attributes=True)
    except msgspec.ValidationError as error:
        raise _no_hub(what, error) from error
    except OSError as error:  # of its certificates, say: nothing is written yet
        raise Unreachable(f"the hub did not give {what}: {_first_line(error)}") from error


@contextlib.contextmanager
def _client_errors(what: str) -> Iterator[None]:
    """Says in our words what the hub's client alone raises in here. It takes whatever it gets for a hub's answer, and stumbles
    over anything else. What it says of the disk is let through, though what it says of the hub is an OSError as well."""
    from huggingface_hub import errors

    # The root of the errors of whatever HTTP library this version of the hub's client is built on.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.GatedRepoError as error:
        raise Unauthorised(f"{what} is gated; accept its terms on the hub and set HF_TOKEN for the agent") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"{what} is not on the hub, or not open to this node; check the name, or set HF_TOKEN for the agent"
        ) from error
    except errors.HFValidationError as error:  # which the client says of itself: no hub was asked
        raise InvalidInput(f"no hub can have {what}: {_first_line(error)}", "source.repo") from error
    except (http_error, errors.LocalEntryNotFoundError, errors.FileMetadataError, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"the hub did not give {what}: {_first_line(error)}") from error
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        _log.exception("the hub's client failed")
        raise _no_hub(what, error) from error


def _no_hub(what: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"what was asked for {what} does not answer as a hub does ({type(error).__name__}: {_first_line(error)}); "
        "see HF_ENDPOINT of the agent's environment"
    )


class _Watch:
    """Reports the growth of a directory while files are downloaded into it."""

    def __init__(self, directory: Path, total: int, progress: Callable[[int, int], None]) -> None:
        self._directory = directory
        self._total = total
        self._progress = progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fetch-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S):
            self._progress(min(self._total, _directory_bytes(self._directory)), self._total)


def _directory_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # it was just renamed to its final name
            continue
    return total


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
