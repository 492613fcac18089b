"""The processes of a node, one verb each: agent, store, zygote, ingest, publish. Imports nothing that is not asked for."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from agent.comm import name_process
from schema.errors import InvalidInput, SllmError


def main(arguments: list[str] | None = None) -> int:
    """Run one process of a node to its end. Returns its exit code; 2 for arguments or settings that are wrong."""
    parser = argparse.ArgumentParser(prog="python -m agent", description="The processes of an sllmctl node.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("agent", help="serve a node").add_argument("--config-json", required=True, help="NodeConfig as JSON")
    for verb in ("store", "zygote"):
        verbs.add_parser(verb, help=f"the {verb} of an agent").add_argument("--run-dir", type=Path, required=True)
    ingest = verbs.add_parser("ingest", help="make a checkpoint; frames on standard output")
    ingest.add_argument("--run-dir", type=Path, required=True)
    ingest.add_argument("--op", required=True)
    ingest.add_argument("--source", required=True, help="a Source as JSON")
    load = verbs.add_parser("bench-load", help="measure how fast this machine loads; a LoadAnswer on standard output")
    load.add_argument("--checkpoints", type=Path, required=True, help="where a digest is looked for")
    load.add_argument("--directory", type=Path, help="a checkpoint's own directory, instead")
    load.add_argument("--digest", default="", help="its beginning; without it the largest checkpoint")
    load.add_argument("--rounds", type=int, default=3)
    load.add_argument("--chunk-bytes", type=int, default=4 << 20)
    load.add_argument("--reader-threads", type=int, default=4)
    publish = verbs.add_parser("publish", help="put a checkpoint on a remote; frames on standard output")
    publish.add_argument("--run-dir", type=Path, required=True)
    publish.add_argument("--op", required=True)
    publish.add_argument("--directory", required=True, help="relative to the node's checkpoints")
    publish.add_argument("--url", required=True)
    given = parser.parse_args(arguments)
    name_process(given.verb)
    try:
        return _run(given)
    except SllmError as error:
        logging.basicConfig(stream=sys.stderr)
        logging.getLogger("agent").error("%s", error)
        return 2 if isinstance(error, InvalidInput) else 1


def _run(given: argparse.Namespace) -> int:
    if given.verb == "agent":
        from agent.config import parse_config
        from agent.daemon.main import main as run_agent

        return run_agent(parse_config(given.config_json))
    if given.verb == "store":
        from agent.store.process import main as run_store

        return run_store(given.run_dir)
    if given.verb == "zygote":
        from agent.workers.zygote import main as run_zygote

        return run_zygote(given.run_dir)
    if given.verb == "bench-load":
        from agent.store.loadbench import main as run_bench_load

        return run_bench_load(
            checkpoints=given.checkpoints, directory=given.directory, digest=given.digest, rounds=given.rounds,
            chunk_bytes=given.chunk_bytes, reader_threads=given.reader_threads,
        )  # fmt: skip
    if given.verb == "publish":
        from agent.store.remote.command import main as run_publish

        return run_publish(given.run_dir, given.op, given.directory, given.url)
    from agent.store.ingest.command import main as run_ingest

    return run_ingest(given.run_dir, given.op, given.source)


if __name__ == "__main__":
    sys.exit(main())
