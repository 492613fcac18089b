"""kill -9 of every process mid-stream: the client's stream goes on, nothing is loaded twice, nothing is left."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from tests.cluster import Cluster, gone
from tests.e2e.talk import SEED, Endless, ask, client

pytestmark = pytest.mark.slow


def kill(cluster: Cluster, role: str) -> int:
    pid = cluster.roster()[role]
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.fixture
def undisturbed(cluster: Cluster) -> str:
    """What the long greedy completion says when nothing happens to it."""
    with client(cluster) as api, Endless(api) as stream:
        text = stream.rest()
    assert len(text) > 200, "the stream is long enough to be disturbed"
    return text


def read_some(stream: Endless, pieces: int = 20) -> None:
    for _ in range(pieces):
        assert stream.token()


def test_a_killed_worker_mid_stream_is_replaced_and_the_stream_goes_on(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    with client(cluster) as api, Endless(api) as stream:
        read_some(stream)
        os.kill(before["pid"], signal.SIGKILL)
        assert stream.rest() == undisturbed
    (after,) = cluster.instances()
    assert after["id"] == before["id"]
    assert after["restarts"] == 1
    assert after["epoch"] > before["epoch"]
    assert after["phases"]["loaded_bytes"] == 0
    assert cluster.get(f"/requests/{stream.request_id}")["attempts"] == 2


def test_another_models_stream_is_untouched_beside_a_killed_worker(cluster: Cluster, talker: Path) -> None:
    """Two models of the same weights, so that tokens in the wrong stream would be as likely as the right ones."""
    cluster.add_model("other", talker, engine={"deterministic": True})
    with client(cluster) as api, Endless(api, max_tokens=300) as stream, _beside(api) as other:
        alone, beside = stream.rest(), other.rest()
    assert alone != beside
    (killed,), (spared,) = cluster.instances(), cluster.instances("other")
    with client(cluster) as api, Endless(api, max_tokens=300) as stream, _beside(api) as other:
        read_some(stream)
        read_some(other)
        os.kill(killed["pid"], signal.SIGKILL)
        assert (stream.rest(), other.rest()) == (alone, beside)
    assert [cluster.get(f"/requests/{each.request_id}")["attempts"] for each in (stream, other)] == [2, 1]
    (after,) = cluster.instances("other")
    assert [after[key] for key in ("pid", "epoch", "restarts")] == [spared["pid"], spared["epoch"], 0]


def _beside(api: openai.OpenAI) -> Endless:
    return Endless(api, model="other", prompt="Beside it", max_tokens=300)


def _wishful(api: openai.OpenAI, disturb: Callable[[], None] | None = None) -> list[tuple[str, list[str], list[float], str]]:
    """Two choices under penalties: text, tokens, log-probabilities and end of each, ``disturb`` called on the way."""
    stream = api.completions.create(
        model="docs", prompt="sllmctl is", max_tokens=200, temperature=0.9, seed=SEED, stream=True, n=2, logprobs=2, user="me",
        frequency_penalty=0.4, presence_penalty=-0.3, logit_bias={"40": 2},
        extra_body={"repetition_penalty": 1.1, "min_p": 0.01},
    )  # fmt: skip
    texts, tokens, logprobs, ends = ["", ""], [[], []], [[], []], ["", ""]  # type: ignore[var-annotated]
    for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends[choice.index] += choice.finish_reason or ""
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens or ()
                logprobs[choice.index] += choice.logprobs.token_logprobs or ()
        if disturb is not None and min(map(len, tokens)) > 20:
            disturb()
            disturb = None
    assert disturb is None
    return list(zip(texts, tokens, logprobs, ends, strict=True))


def test_choices_penalties_and_log_probabilities_survive_a_killed_worker(cluster: Cluster) -> None:
    with client(cluster) as api:
        quiet = _wishful(api)
        (before,) = cluster.instances()
        disturbed = _wishful(api, lambda: os.kill(before["pid"], signal.SIGKILL))
    assert cluster.instances()[0]["restarts"] == 1
    assert quiet[0][0] != quiet[1][0]
    for (text, tokens, logprobs, end), (text_after, tokens_after, logprobs_after, end_after) in zip(
        quiet, disturbed, strict=True
    ):
        assert (text, tokens, end) == (text_after, tokens_after, end_after)
        assert len(tokens) == len(logprobs) == 200
        assert logprobs_after == pytest.approx(logprobs, abs=1e-3)


def test_a_killed_store_gets_its_arena_back_and_reads_nothing_again(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    with client(cluster) as api, Endless(api) as stream:
        read_some(stream)
        killed = kill(cluster, "store")
        assert stream.rest() == undisturbed
    cluster.until(lambda: cluster.roster().get("store", killed) != killed, "another store runs", 60)
    assert [i["pid"] for i in cluster.instances()] == [before["pid"]]
    cluster.post("/models/docs/deploy", {"scale": {"min": 0, "max": 1, "keep_alive_s": 0.1}})
    cluster.until(lambda: not cluster.instances(), "the instance has gone", 60)
    again = ask(cluster, "What is sllmctl?")
    start = cluster.get(f"/requests/{again.request_id}")["timeline"]["start"]
    assert (start["loaded_from"], start["loaded_bytes"]) == ("dram", 0)
    lost, back = [event for event in cluster.get("/events?limit=1000")["items"] if event["reason"].startswith("Store")]
    assert [(event["kind"], event["level"]) for event in (lost, back)] == [("node", "warning"), ("node", "info")]
    assert f"kept: {before['digest'][:12]} (memory), " in back["message"]
    (placement,) = [each for each in cluster.get("/checkpoints")["items"][0]["placements"] if each["tier"] == "disk"]
    assert [(copy["in_place"], copy["verified"]) for copy in placement["copies"]] == [(False, True)], "by its first load"


def test_a_killed_zygote_is_replaced_and_workers_go_on(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    with client(cluster) as api, Endless(api) as stream:
        read_some(stream)
        killed = kill(cluster, "zygote")
        assert stream.rest() == undisturbed
    assert [i["pid"] for i in cluster.instances()] == [before["pid"]]
    cluster.until(lambda: cluster.roster().get("zygote", killed) != killed, "another zygote runs", 60)
    os.kill(before["pid"], signal.SIGKILL)
    assert ask(cluster, "What is sllmctl?").text
    assert cluster.ready_instance()["restarts"] == 1


def test_a_killed_agent_is_restarted_and_adopts_everything(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    roster = cluster.roster()
    with client(cluster) as api, Endless(api) as stream:
        read_some(stream)
        killed = kill(cluster, "agent")
        assert stream.rest() == undisturbed
    after = cluster.until(
        lambda: r if (r := cluster.roster()).get("agent", killed) != killed and len(r) == len(roster) else None,
        "another agent knows all of its kin",
        60,
    )
    assert {role: pid for role, pid in after.items() if role != "agent"} == {
        role: pid for role, pid in roster.items() if role != "agent"
    }
    assert [(i["pid"], i["epoch"], i["restarts"]) for i in cluster.instances()] == [(before["pid"], before["epoch"], 0)]
    assert cluster.get(f"/requests/{stream.request_id}")["attempts"] == 1


def test_agent_and_worker_killed_together_mid_stream(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    with client(cluster) as api, Endless(api) as stream:
        read_some(stream)
        kill(cluster, "agent")
        os.kill(before["pid"], signal.SIGKILL)
        assert stream.rest() == undisturbed


def test_a_killed_manager_comes_back_to_warm_instances_and_ends_orphans(cluster: Cluster, undisturbed: str) -> None:
    (before,) = cluster.instances()
    roster = cluster.roster()
    with client(cluster) as api, Endless(api, max_tokens=1500) as stream:
        read_some(stream)
        cluster.kill_manager()
        with pytest.raises((openai.APIError, httpx.TransportError)):
            stream.rest()
    cluster.start()
    assert cluster.roster() == roster
    after = cluster.ready_instance()
    assert (after["id"], after["pid"], after["epoch"]) == (before["id"], before["pid"], before["epoch"])
    warm = ask(cluster, "What is sllmctl?")
    assert not cluster.get(f"/requests/{warm.request_id}")["timeline"]["cold"]
    cluster.until(
        lambda: not [r for r in cluster.get("/requests")["items"] if r["orphaned"] and r["state"] in {"waiting", "running"}],
        "orphaned sequences have ended",
        60,
    )


def _keyed(cluster: Cluster, pieces: int | None = None) -> tuple[str, httpx.Headers]:
    """The text of a completion without a seed, under one Idempotency-Key; all of it, or so many pieces."""
    body = {"model": "docs", "prompt": "sllmctl is", "max_tokens": 600, "temperature": 1, "stream": True}
    text = ""
    with httpx.stream(
        "POST", f"{cluster.url}/v1/completions", json=body, headers={"Idempotency-Key": "once"}, timeout=240
    ) as answer:
        assert answer.status_code == 200
        events = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        for event in itertools.islice(events, pieces):
            if event != "[DONE]":
                text += json.loads(event)["choices"][0]["text"]
        if pieces is not None:
            cluster.kill_manager()
        return text, answer.headers


def test_a_retry_gets_its_tokens_over_a_killed_manager_and_its_reply_over_another(cluster: Cluster) -> None:
    begun, _ = _keyed(cluster, 20)
    cluster.start()
    whole, headers = _keyed(cluster)
    assert headers["idempotent-replayed"] == "true"
    assert whole.startswith(begun)
    assert len(whole) > len(begun) > 0
    assert cluster.get(f"/requests/{headers['x-request-id']}")["attempts"] == 1
    cluster.kill_manager()
    cluster.start()
    again, headers = _keyed(cluster)
    assert (again, headers["idempotent-replayed"]) == (whole, "true")
    (instance,) = cluster.instances()
    assert (instance["restarts"], instance["running"]) == (0, 0)


def test_a_client_that_disconnects_cancels_down_to_the_engine(cluster: Cluster, undisturbed: str) -> None:
    with client(cluster) as api, Endless(api, max_tokens=1500) as stream:
        read_some(stream, 3)
    request = cluster.until(
        lambda: r if (r := cluster.get(f"/requests/{stream.request_id}"))["state"] == "cancelled" else None,
        "the request is cancelled",
        60,
    )
    assert request["generated_tokens"] < 1500
    cluster.until(lambda: all(i["running"] == 0 for i in cluster.instances()), "the engine is idle", 60)


def test_a_manager_and_its_agent_killed_leave_kin_that_end_themselves(cluster: Cluster) -> None:
    ask(cluster, "What is sllmctl?")
    cluster.kill_manager()
    kill(cluster, "agent")
    cluster.start()
    assert cluster.ready_instance()["restarts"] == 0
    pids = cluster.processes()
    assert cluster.stop() == 0
    assert all(gone(pid) for pid in pids)
