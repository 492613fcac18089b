import pytest

from schema.errors import InvalidInput
from schema.spec import HubSource, PathSource, UrlSource, parse_spec, source_of

MINIMAL = {"name": "docs", "source": {"kind": "path", "path": "/models/docs"}}


def test_a_minimal_spec_scales_to_zero() -> None:
    spec = parse_spec(MINIMAL)
    assert (spec.scale.min, spec.scale.max, spec.source) == (0, 1, PathSource("/models/docs"))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"scale": {"min": -1}}, "scale.min"),
        ({"scale": {"min": 3, "max": 2}}, "scale.min"),
        ({"scale": {"maximum": 2}}, "scale.maximum"),
        ({"engine": {"threads": "two"}}, "engine.threads"),
        ({"source": {"kind": "hub", "repo": "../escape"}}, "source.repo"),
        ({"source": {"kind": "path", "path": "relative"}}, "source.path"),
        ({"source": {"kind": "path", "path": "/with\0nul"}}, "source.path"),
        ({"name": "no/slash"}, "name"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_spec(MINIMAL | change)
    assert caught.value.param == param


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(InvalidInput, match="replicas"):
        parse_spec(MINIMAL | {"replicas": 2})


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("/models/a", PathSource("/models/a")),
        ("gpu-1:/models/a", PathSource("/models/a", "gpu-1")),
        ("Qwen/Qwen3-0.6B", HubSource("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@v1", HubSource("Qwen/Qwen3-0.6B", "v1")),
        ("https://models.example/a/b/", UrlSource("https://models.example/a/b")),
        ("http://10.0.0.1:8000/m", UrlSource("http://10.0.0.1:8000/m")),
        ("ftp://models.example/a", None),
        ("just-a-name", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_words_of_the_command_line_become_sources(word: str, source: object) -> None:
    assert source_of(word) == source


@pytest.mark.parametrize(
    "url", ["https://user:secret@host/m", "https://host/m?token=secret", "https://host/a/../b", "https:///m"]
)
def test_a_url_with_a_credential_or_a_climbing_path_is_no_source(url: str) -> None:
    for take in (lambda: source_of(url), lambda: parse_spec(MINIMAL | {"source": {"kind": "url", "url": url}})):
        with pytest.raises(InvalidInput) as caught:
            take()
        assert "secret" not in str(caught.value)
