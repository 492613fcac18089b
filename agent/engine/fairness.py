"""Whose turn it is: the tenant that was served least goes first, and its sequences in the order of their arrival.

Service is counted in tokens: those of a prompt when its sequence is first admitted, then one for each that is generated. A
tenant that comes new, or comes back, starts level with the one served least, so that nobody saves up turns by staying away.
(After the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.engine.sequence import Sequence

__all__ = ["Account", "FairQueue"]


class Account:
    """What one tenant was served in tokens, who of it waits, and how many of its sequences are here."""

    __slots__ = ("line", "live", "served", "tenant")

    def __init__(self, tenant: str, served: int = 0) -> None:
        self.tenant = tenant
        self.served = served
        self.line: deque[Sequence] = deque()
        self.live = 0


class FairQueue:
    """The sequences that wait, and the accounts of all tenants that have one here, waiting or running."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._arrivals = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def join(self, sequence: Sequence) -> None:
        """A new sequence, last in its tenant's line."""
        tenant = sequence.account.tenant
        account = self._accounts.get(tenant)
        if account is None:
            least = min((other.served for other in self._accounts.values()), default=0)
            account = self._accounts[tenant] = Account(tenant, least)
        account.live += 1
        account.line.append(sequence)
        sequence.account = account
        sequence.arrival = next(self._arrivals)
        self._size += 1

    def back(self, sequence: Sequence) -> None:
        """One that ran waits again, first in its tenant's line."""
        sequence.account.line.appendleft(sequence)
        self._size += 1

    def take(self, sequence: Sequence) -> None:
        """One that waits will run."""
        sequence.account.line.remove(sequence)
        self._size -= 1

    def leave(self, sequence: Sequence) -> None:
        """One that neither waits nor runs any more: it has ended."""
        account = sequence.account
        account.live -= 1
        if not account.live:
            del self._accounts[account.tenant]

    def turns(self) -> Iterator[Sequence]:
        """Those who wait, in the order of their turns; each may be taken, and its tenant charged, before the next comes."""
        turns = [(account.served, account.line[0].arrival, 0, account) for account in self._accounts.values() if account.line]
        heapq.heapify(turns)
        while turns:
            _, _, at, account = heapq.heappop(turns)
            sequence = account.line[at]
            yield sequence
            if at < len(account.line) and account.line[at] is sequence:
                at += 1
            if at < len(account.line):
                heapq.heappush(turns, (account.served, account.line[at].arrival, at, account))
