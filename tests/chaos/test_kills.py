"""Random kills under several streams at once: every text is the undisturbed one, nothing is counted that is not there, nothing
is left."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.chaos.havoc import NODE_ROLES, PROMPTS, Havoc, hear_out, kill, new_seed, undisturbed
from tests.cluster import Cluster
from tests.e2e.talk import ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ORPHAN_GRACE_S = 1.0
# Kills follow each other as they never do in practice, so their back-off is made short and their number forgotten soon.
SETTINGS = f"[control]\nrestart_first_s = 0.1\nhealthy_s = 0.2\n[router]\norphan_grace_s = {ORPHAN_GRACE_S}\n"
KILLS = 6
ROUNDS = 2
LIVE = {"waiting", "running"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(settings=SETTINGS) as made:
        made.add_model(engine={"deterministic": True})
        yield made


def settled(cluster: Cluster) -> None:
    """All kin are there again, nothing runs, and nothing is counted as if it did."""
    cluster.until(
        lambda: {"agent", "store", "zygote"} <= {role for role, pid in cluster.roster().items() if pid in cluster.processes()},
        "agent, store and zygote run",
        60,
    )
    instance = cluster.ready_instance()
    cluster.until(lambda: all(one["running"] == 0 for one in cluster.instances()), "no instance counts a sequence", 60)
    assert not [one for one in cluster.get("/requests")["items"] if one["state"] in LIVE]
    workers = {role: pid for role, pid in cluster.roster().items() if role.startswith("worker:")}
    assert workers == {f"worker:{instance['id']}": instance["pid"]}
    assert len(cluster.instances()) == 1


def test_streams_survive_random_kills_of_the_nodes_processes(cluster: Cluster) -> None:
    chance = random.Random(new_seed())
    texts = undisturbed(cluster)
    whole = ROUNDS * sum(len(text) for text in texts.values())
    struck: list[str] = []

    def strike(point: int) -> None:
        roles = chance.sample(NODE_ROLES, chance.choice((1, 1, 2)))
        struck.extend(f"{role}{'' if kill(cluster, role) else ' (none there)'} at {point}/{whole}" for role in roles)

    havoc = Havoc(sorted(chance.sample(range(1, whole * 9 // 10), KILLS)), strike)

    def listen(prompt: str) -> None:
        for _ in range(ROUNDS):
            assert hear_out(cluster, prompt, havoc.read) == texts[prompt]

    try:
        havoc.run(listen, list(PROMPTS), 240)
        settled(cluster)
    finally:
        print("killed:", "; ".join(struck))
    assert cluster.stop() == 0
    assert cluster.processes() == []


def test_a_manager_killed_at_random_points_comes_back_to_one_instance_and_no_orphans(cluster: Cluster) -> None:
    chance = random.Random(new_seed())
    texts = undisturbed(cluster)
    for _ in range(2):
        # From before the first token, when requests are on their way to the engine, to well within the streams.
        havoc = Havoc([chance.randrange(1, 800)], lambda _: cluster.kill_manager())

        def listen(prompt: str, havoc: Havoc = havoc) -> None:
            with contextlib.suppress(openai.APIError, httpx.TransportError):
                # A slow reader's stream may have been sent to its end before the kill.
                assert hear_out(cluster, prompt, havoc.read) == texts[prompt]

        havoc.run(listen, list(PROMPTS), 240)
        if chance.random() < 0.5:
            role = chance.choice(NODE_ROLES)
            print(f"and the {role}: {kill(cluster, role)}")
        cluster.start()
        began = time.monotonic()
        prompt = chance.choice(PROMPTS)
        assert hear_out(cluster, prompt) == texts[prompt]
        cluster.until(
            lambda: not [one for one in cluster.get("/requests")["items"] if one["orphaned"] and one["state"] in LIVE],
            "orphans have ended",
            ORPHAN_GRACE_S + 30,
        )
        print(f"orphans gone {time.monotonic() - began:.2f} s after the start")
        settled(cluster)
    assert ask(cluster, "What is sllmctl?").text
    assert cluster.stop() == 0
    assert cluster.processes() == []
