"""The agent's peers, played in the test: a manager, a store, a zygote and workers that speak the links' protocol."""

from tests.agent.daemon.peers.base import DIGEST, WAIT_S, Peer
from tests.agent.daemon.peers.manager import Manager
from tests.agent.daemon.peers.node import Node
from tests.agent.daemon.peers.store import Store
from tests.agent.daemon.peers.words import alive, hello, make_checkpoint, start_instance, submit
from tests.agent.daemon.peers.worker import Worker

__all__ = [
    "DIGEST",
    "WAIT_S",
    "Manager",
    "Node",
    "Peer",
    "Store",
    "Worker",
    "alive",
    "hello",
    "make_checkpoint",
    "start_instance",
    "submit",
]
