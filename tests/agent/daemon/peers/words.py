"""What the peers say to the agent, and what lies on a node: a greeting, a start, a request, a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from schema.checkpoint import (
    KvGeometry,
    Manifest,
    Partition,
    TensorEntry,
    TextDefaults,
    encode_manifest,
)
from schema.ids import Epoch, epoch_of
from schema.link import (
    EngineOptions,
    Hello,
    Role,
    SamplingParams,
    StartInstance,
    Submit,
)
from tests.agent.daemon.peers.base import DIGEST


def hello(role: Role, **fields: Any) -> Hello:
    return Hello(role=role, software="test", pid=fields.pop("pid", os.getpid()), **fields)


def submit(attempt: Epoch, start: StartInstance, **fields: Any) -> Submit:
    return Submit(
        attempt=attempt,
        instance=start.instance,
        instance_epoch=start.epoch,
        request="req_1",
        model="m",
        prompt=(1, 2, 3),
        params=SamplingParams(max_tokens=8),
        **fields,
    )


FIRST = epoch_of(1, 1)


def start_instance(instance: str = "inst_1", epoch: Epoch = FIRST, **fields: Any) -> StartInstance:
    return StartInstance(
        instance=instance,
        epoch=epoch,
        model="m",
        digest=fields.pop("digest", DIGEST),
        devices=fields.pop("devices", (0,)),
        options=EngineOptions(kv_bytes=1 << 20),
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state not in (b"Z", b"X")


def make_checkpoint(root: Path, digest: str = DIGEST, layout: str = "l1") -> Path:
    """A committed checkpoint of one tensor, as ingest leaves it. Each layout has an image of its own."""
    directory = root / digest / layout
    directory.mkdir(parents=True)
    (directory / "part-0").write_bytes(b"\1" * 4096)
    manifest = Manifest(
        format_version=1,
        digest=digest,
        layout=layout,
        architecture="LlamaForCausalLM",
        parameters=1024,
        vocab_size=64,
        max_context_tokens=128,
        chunk_bytes=4096,
        partitions=(Partition("part-0", 0, 4096, (0 if layout == "l1" else 1,)),),
        tensors=(TensorEntry("w", "F32", (1024,), 0, 0, 4096),),
        ties={},
        kv=KvGeometry(layers=1, kv_heads=1, head_dim=4, dtype="F32"),
        config={},
        text=TextDefaults(),
        assets=(),
    )
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
    return directory
