"""Files of specs: what is taken, and what is refused with its file, its line and its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.spec import EngineSpec, HubSource, ModelSpec, PathSource, ScaleSpec, UrlSource
from sllmctl.cli.output import show_documents
from sllmctl.specs.files import InvalidSpecs, read_specs
from sllmctl.specs.nodes import read_documents
from tests.examples import examples

_TWO = """\
# yaml-language-server: $schema=./model-spec.schema.json
name: tiny
source: {kind: path, path: /models/tiny}
---
- name: qwen
  source:
    kind: hub
    repo: Qwen/Qwen3-0.6B
  scale: &scale {min: 1, max: 3}
- name: NO
  source: {kind: url, url: "https://models.example/a"}
  scale: *scale
---
"""
_GOOD = "name: a\nsource: {kind: path, path: /m}\n"


def _said(tmp_path: Path, text: str | bytes, name: str = "models.yaml") -> list[str]:
    """What is wrong with a file, without the directory."""
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidSpecs) as caught:
        read_specs([str(file)])
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")]


def test_documents_and_lists_hold_several_models(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(_TWO)
    scale = ScaleSpec(min=1, max=3)
    entries = read_specs([str(tmp_path / "two.yaml")])
    assert [entry.spec for entry in entries] == [
        ModelSpec(name="tiny", source=PathSource("/models/tiny")),
        ModelSpec(name="qwen", source=HubSource("Qwen/Qwen3-0.6B"), scale=scale),
        ModelSpec(name="NO", source=UrlSource("https://models.example/a"), scale=scale),
    ]
    assert [entry.place().rpartition(":")[2] for entry in entries] == ["2", "5", "10"]


def test_a_directory_gives_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(
        '[\t{"name": "\\ud83d\\ude00", "source": {"kind": "path", "path": "\\/m"}}]'.replace("\\ud83d\\ude00", "b")
    )
    (tmp_path / "a.yml").write_text(_GOOD)
    (tmp_path / "readme.md").write_text("no spec")
    assert [entry.spec.name for entry in read_specs([str(tmp_path)])] == ["a", "b"]


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("/models/a", PathSource("/models/a")),
        ("gpu1:/models/a", PathSource("/models/a", "gpu1")),
        ("Qwen/Qwen3-0.6B", HubSource("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@v1/x", HubSource("Qwen/Qwen3-0.6B", "v1/x")),
        ("https://models.example/a", UrlSource("https://models.example/a")),
    ],
)
def test_a_source_may_be_a_word(tmp_path: Path, word: str, source: object) -> None:
    (tmp_path / "a.yaml").write_text(f"name: a\nsource: {word}\n")
    (entry,) = read_specs([str(tmp_path / "a.yaml")])
    assert entry.spec.source == source


def test_a_directory_in_a_word_is_looked_for_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    models = "- {name: a, source: ./a}\n- {name: b, source: ../b/c}\n- {name: c, source: .}\n"
    (tmp_path / "specs" / "a.yaml").write_text(models)
    monkeypatch.chdir(tmp_path)
    entries = read_specs(["specs/a.yaml"])
    assert [entry.spec.source for entry in entries] == [
        PathSource(f"{tmp_path}/specs/a"), PathSource(f"{tmp_path}/b/c"), PathSource(f"{tmp_path}/specs"),
    ]  # fmt: skip


def test_what_is_written_out_reads_back_as_it_was(tmp_path: Path) -> None:
    spec = ModelSpec(
        name="a", source=PathSource("/m\t\U0001f600", "gpu1", True), devices=2,
        scale=ScaleSpec(keep_alive_s=2.5), engine=EngineSpec(threads=3, deterministic=True),
    )  # fmt: skip
    plain = msgspec.to_builtins(spec)
    for name, text in (("a.yaml", yaml.safe_dump(plain)), ("a.json", json.dumps(plain, indent="\t"))):
        (tmp_path / name).write_text(text)
        assert [entry.spec for entry in read_specs([str(tmp_path / name)])] == [spec]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_GOOD + "scale:\n  min: two\n", "4: scale.min: expected int, got str 'two'"),
        (_GOOD + "scale:\n  mim: 2\n", "4: scale.mim: unknown key; did you mean 'min'?"),
        (_GOOD + "scaling: {min: 2}\n", "3: scaling: unknown key; did you mean 'scale'?"),
        (_GOOD + "threads: 2\n", "3: threads: unknown key; did you mean 'engine.threads'?"),
        (_GOOD + "quantisation: 4\n", "3: quantisation: unknown key"),
        (_GOOD + "scale: {min: 3}\n", "3: scale.min: 3 is above scale.max, 1"),
        (_GOOD + "devices: 0\n", "3: devices: expected int >= 1"),
        (_GOOD + "engine: {deterministic: off}\n", "3: engine.deterministic: expected bool, got str 'off'"),
        (_GOOD + "engine: {kv_bytes: 64MiB}\n", "3: engine.kv_bytes: expected int | null, got str '64MiB'"),
        (_GOOD + "engine: [1]\n", "3: engine: expected object, got array"),
        (_GOOD + "name: b\n", "3: name: it is given twice, first on line 1"),
        (_GOOD + "devices: 010\n", "3: 010 is octal to some and decimal to others; write no leading zero, or quote it"),
        (_GOOD + "<<: {devices: 2}\n", "3: merge keys (<<) are not taken; repeat the keys, or anchor the value of one"),
        (_GOOD + "? [a]\n: 1\n", "3: a key is a plain word"),
        (_GOOD + "devices: !!python/object:os.system 1\n", "3: the tag tag:yaml.org,2002:python/object:os.system is not taken"),
        (_GOOD + "scale: !thing {min: 1}\n", "3: the tag !thing is not taken; leave it out"),
        (_GOOD + "scale: &a {min: *a}\n", "3: it is nested too deeply, or its aliases make too much of it"),
        (_GOOD + "scale: *nowhere\n", "3: it is not valid YAML: found undefined alias 'nowhere'"),
        ("name: a\nsource: {kind: hub, repo: justaname}\n", "2: source.repo: expected ORGANISATION/NAME"),
        ("name: a\nsource: {kind: ftp, url: x}\n", "2: source.kind: expected one of path, hub, url"),
        ("name: a\nsource: {path: /m}\n", "2: source.kind: it is missing"),
        ("name: a\nsource: ~/m\n", "2: source: '~/m' is none; it is /PATH, ./PATH, "),
        ("name: a\nsource: [/m]\n", "2: source: expected object, got array"),
        ("name: a\nsource: http://u:secret@h/m\n", "2: source: the URL of a remote has no user"),
        ("name: a\nsource: {kind: url, url: 'http://u:secret@h/m'}\n", "2: source.url: the URL of a remote has no user"),
        ('name: "a\\n"\nsource: {kind: path, path: /m}\n', "1: name: expected 1 to 63 letters"),
        ("name: 12\nsource: {kind: path, path: /m}\n", "1: name: expected str, got int 12"),
        ("name: a\n", "1: source: it is missing"),
        ("just words\n", "1: expected a model spec, got the value 'just words'"),
        ("- null\n", "1: expected a model spec, got nothing"),
        ("models:\n  - name: a\n", "1: leave out 'models:' above the list; a list of models stands by itself"),
        ("name: a\n  source: b\n", "2: it is not valid YAML: mapping values are not allowed here"),
        ("name: a\nstate: ready\nspec: {}\n", "1: this is what `model show` prints; `sllmctl model spec NAME` prints"),
        ("a: \n \x00", "2: it is not valid YAML: character U+0000 stands in it"),
        (b"name: a\nsource: \xff\n", "2: it is not UTF-8 text"),
        ("[" * 5000, "1: it is nested too deeply"),
        ("x: " + "[" * 40 + "]" * 40, "1: it is nested too deeply, or its aliases make too much of it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line_and_key(tmp_path: Path, text: str | bytes, said: str) -> None:
    (line,) = _said(tmp_path, text)
    assert line.startswith(f"models.yaml:{said}")
    assert "secret" not in line


def test_aliases_that_multiply_are_cut_off(tmp_path: Path) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (line,) = _said(tmp_path, "\n".join(layers))
    assert "aliases make too much of it" in line


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = "name: a\nsource: {kind: path, path: m}\n---\nname: b\ndevices: x\nsource: {kind: path, path: /m}\n"
    assert _said(tmp_path, text) == [
        "models.yaml:2: source.path: expected an absolute path",
        "models.yaml:5: devices: expected int, got str 'x'",
    ]
    text = "source: hub\nscale: []\nengine:\n  threads: two\n  thread: 2\nscal: 1\ncold_start_timeout_s: soon\n"
    assert _said(tmp_path, text) == [
        "models.yaml:1: source: 'hub' is none; it is /PATH, ./PATH, NODE:/PATH, ORGANISATION/NAME of a hub, or https://HOST/PATH",
        "models.yaml:1: name: it is missing",
        "models.yaml:2: scale: expected object, got array",
        "models.yaml:4: engine.threads: expected int | null, got str 'two'",
        "models.yaml:5: engine.thread: unknown key; did you mean 'threads'?",
        "models.yaml:6: scal: unknown key; did you mean 'scale'?",
        "models.yaml:7: cold_start_timeout_s: expected float, got str 'soon'",
    ]
    many = "".join(f"k{number}: 1\n" for number in range(500))
    assert 1 < len(_said(tmp_path, _GOOD + many)) < 50
    assert len(_said(tmp_path, _GOOD + "a.b: 1\n")) == 1, "a key that cannot be looked up by its place ends it"
    assert _said(tmp_path, f"{_GOOD}---\n{_GOOD}") == [
        f"models.yaml:4: name: model 'a' stands in {tmp_path}/models.yaml:1 already"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a",\n "name": "b"}', "2: name: it is given twice, first on line 1"),
        ('{"name": "a",\n}', "2: it is not valid JSON: "),
        ('{"name": "\\ud83d", "source": {"kind": "path", "path": "/m"}}', "1: half a character stands in a text"),
        ("[" * 100_000, "1: it is nested too deeply"),
    ],
)
def test_json_is_told_as_json(tmp_path: Path, text: str, said: str) -> None:
    (line,) = _said(tmp_path, text, "models.json")
    assert line.startswith(f"models.json:{said}")


def test_files_that_give_nothing_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "comments.yaml").write_text("# nothing\n---\n")
    for name, said in (("empty", "no file in it ends with"), ("comments.yaml", "no model spec"), ("none", "No such file")):
        with pytest.raises(InvalidSpecs, match=said):
            read_specs([str(tmp_path / name)])


def test_what_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidSpecs, match="it is longer than 1048576 bytes"):
        read_specs(["/dev/zero"])


_LEAF = (
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
_VALUE = st.recursive(
    _LEAF, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=20), below, max_size=3)
)


@settings(max_examples=examples(60))
@given(value=st.dictionaries(st.text(max_size=20), _VALUE, max_size=4), plain=st.booleans())
def test_json_is_read_as_json_is(value: dict[str, Any], plain: bool) -> None:
    (document,) = read_documents(json.dumps(value, ensure_ascii=plain, indent="\t").encode(), as_json=True)
    assert document.value == value


@pytest.mark.parametrize(
    "text",
    ["1e5", "089", "010", "0x1F", "1_000", "no", "NULL", "~", "12:30", "2026-11-28", ".5", "+1", "-", "1.", "é", "a: b", " #"],
)
def test_what_is_printed_as_yaml_is_read_as_it_was(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_documents("yaml", [{"text": text}])
    (document,) = read_documents(capsys.readouterr().out.encode())
    assert document.value == {"text": text}
