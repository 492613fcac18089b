"""`apply` and `diff`: what they ask of the manager, what they print, and how they end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from schema.admin import AppliedView, ChangeView
from schema.errors import Fault
from sllmctl.cli import waiting
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import MODELS, FakeManager

_CREATED = AppliedView(name="new", action="created", changes=(ChangeView(key="source.path", old=None, new="/m"),))
_CONFIGURED = AppliedView(
    name="qwen",
    action="configured",
    changes=(
        ChangeView(key="scale.keep_alive_s", old=None, new=3.0),
        ChangeView(key="scale.max", old=2, new=4),
        ChangeView(key="engine.deterministic", old=False, new=True),
    ),
    restarts=1,
)
_SAME = AppliedView(name="coming", action="unchanged")
_FILE = "name: new\nsource: {kind: path, path: /m}\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(_FILE)
    return str(path)


def _bodies(manager: FakeManager) -> list[Any]:
    return [body for method, path, body in manager.asked if path == "apply"]


def test_diff_says_what_would_change_and_exits_with_1(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    manager.answer("POST apply", 200, {"items": [_CREATED, _CONFIGURED, _SAME]})
    said = sllmctl("diff", "-f", file)
    assert (said.code, said.err) == (1, "")
    assert said.out == (
        "+ model new: created\n"
        "    source.path: /m\n"
        "~ model qwen: configured, restarts 1 instance\n"
        "    scale.keep_alive_s: 3.0\n"
        "    scale.max: 2 -> 4\n"
        "    engine.deterministic: false -> true\n"
    )
    assert [body["dry_run"] for body in _bodies(manager)] == [True]
    assert json.loads(sllmctl("diff", "-f", file, "-o", "json").out)[1]["changes"][1] == {
        "key": "scale.max",
        "old": 2,
        "new": 4,
    }


def test_diff_without_differences_exits_with_0(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    manager.answer("POST apply", 200, {"items": [_SAME]})
    said = sllmctl("diff", "-f", file)
    assert (said.code, said.out, said.err) == (0, "", "")


def test_apply_looks_first_and_then_does_it(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    manager.answer("POST apply", 200, {"items": [_CREATED, _CONFIGURED, _SAME]})
    said = sllmctl("apply", "-f", file)
    assert said.code == 0
    assert said.out == (
        "MODEL   ACTION      RESTARTS  CHANGES\n"
        "new     created            0  source.path: /m\n"
        "qwen    configured         1  scale.keep_alive_s: 3.0, scale.max: 2 -> 4, engine.deterministic: false -> true\n"
        "coming  unchanged          0  -\n"
    )
    assert [(body["dry_run"], body["deploy"]) for body in _bodies(manager)] == [(True, True), (False, True)]


def test_a_dry_run_does_nothing(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    manager.answer("POST apply", 200, {"items": [_CREATED]})
    said = sllmctl("apply", "-f", file, "--dry-run", "--no-deploy", "-o", "name")
    assert (said.code, said.out, said.err) == (0, "new\n", "nothing was changed\n")
    assert [(body["dry_run"], body["deploy"]) for body in _bodies(manager)] == [(True, False)]


def test_a_refusal_names_the_place_that_asks_for_it(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    fault = Fault("conflict", "model new: source.path: '/a' cannot become '/m'")
    manager.answer("POST apply", 200, {"items": [AppliedView(name="new", action="refused", fault=fault, key="source.path")]})
    for verb in ("apply", "diff"):
        said = sllmctl(verb, "-f", file)
        assert (said.code, said.err) == (6, f"error: {file}:2: {fault.message}\n")
    assert all(body["dry_run"] for body in _bodies(manager))


def test_what_is_wrong_in_a_file_is_asked_of_nobody(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    Path(file).write_text(_FILE + "scal: {}\n")
    said = sllmctl("apply", "-f", file)
    assert (said.code, said.err) == (2, f"error: {file}:3: scal: unknown key; did you mean 'scale'?\n")
    assert manager.asked == []


def test_pruning_asks_and_names_what_goes(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    gone = AppliedView(name="broken", action="removed")
    manager.answer("POST apply", 200, {"items": [_CREATED, gone]})
    refused = sllmctl("apply", "-f", file, "--prune")
    assert refused.code == 2
    assert "Remove broken, which no file has" in refused.err
    assert [body["dry_run"] for body in _bodies(manager)] == [True]
    assert _bodies(manager)[0]["remove"] == [model.name for model in MODELS]
    assert sllmctl("apply", "-f", file, "--prune", "-y").code == 0
    assert _bodies(manager)[-1]["remove"] == ["broken"]


@pytest.mark.parametrize(("given", "left_s"), [(("-y",), [10.0, 6.0, 2.0]), ((), [10.0, 6.0, 10.0])])
def test_only_the_time_that_a_person_takes_to_answer_does_not_count(
    sllmctl: Sllmctl,
    manager: FakeManager,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    given: tuple[str, ...],
    left_s: list[float],
) -> None:
    now, limits = [1000.0], []
    real = httpx.Client.request

    def request(client: httpx.Client, *args: Any, timeout: httpx.Timeout, **more: Any) -> httpx.Response:
        limits.append(timeout.read)
        now[0] += 4.0
        return real(client, *args, timeout=60.0, **more)

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: True)
    manager.answer("POST apply", 200, {"items": [AppliedView(name="broken", action="removed")]})
    assert sllmctl("apply", "-f", file, "--prune", "--timeout", "10", *given).code == 0
    assert limits == left_s


def test_waiting_is_for_each_model(sllmctl: Sllmctl, manager: FakeManager, file: str) -> None:
    manager.answer("POST apply", 200, {"items": [_CREATED]})
    manager.answer("GET models/new", 202, MODELS[2])
    manager.answer("GET models/new", 200, MODELS[0])
    assert sllmctl("apply", "-f", file, "--wait", "--timeout", "600").code == 0
    assert [path.split("&")[0] for _, path, _ in manager.asked if path.startswith("models/new")] == [
        "models/new?wait=ready"
    ] * 2


def test_a_model_that_fails_keeps_no_other_from_being_waited_for(
    sllmctl: Sllmctl, manager: FakeManager, tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(f"name: bad\nsource: {{kind: path, path: /b}}\n---\n{_FILE}")
    manager.answer("POST apply", 200, {"items": [_CREATED]})
    manager.refuse("GET models/bad", 404, "not_found", "/b is no directory on this node")
    manager.answer("GET models/new", 200, MODELS[0])
    said = sllmctl("apply", "-f", str(path), "--wait")
    assert (said.code, said.err) == (5, "error: model bad: /b is no directory on this node\n")
    assert manager.asked[-1][1].startswith("models/new?wait=ready")


def test_what_does_not_apply_of_a_foreign_file_is_told(
    sllmctl: Sllmctl, manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b'{"model": "facebook/opt-1.3b",\n "backend": "vllm"}'
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text), isatty=lambda: False))
    manager.answer("POST apply", 200, {"items": [_SAME]})
    said = sllmctl("apply", "-f", "-")
    assert said.code == 0
    assert said.err.splitlines() == [
        "warning: <stdin>:1: model: a name has no '/': requests call it 'opt-1.3b' here",
        "warning: <stdin>:2: backend: the engine is sllmctl's own",
    ]
    assert _bodies(manager)[-1]["models"][0]["source"]["repo"] == "facebook/opt-1.3b"


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_models_spec_is_what_apply_takes(sllmctl: Sllmctl, manager: FakeManager, tmp_path: Path, form: str) -> None:
    manager.answer("POST apply", 200, {"items": [_SAME]})
    path = tmp_path / f"all.{form}"
    path.write_text(sllmctl("model", "spec", "-o", form).out)
    assert sllmctl("diff", "-f", str(path)).code == 0
    assert [each["name"] for each in _bodies(manager)[-1]["models"]] == [model.name for model in MODELS]
    assert sllmctl("model", "spec", "qwen", "-o", form).out.count("Qwen3-0.6B") == 1


def test_the_schema_is_printed(sllmctl: Sllmctl) -> None:
    assert json.loads(sllmctl("schema").out)["definitions"]["ModelSpec"]["required"] == ["name", "source"]
