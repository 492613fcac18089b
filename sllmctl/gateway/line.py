"""Who waits for a model: those first that ran already, then the tenants in turns, each one's sequences in order of arrival.

The turn is the tenant's that was served least while it had somebody waiting, in tokens that its sequences were taken to need.
So a client that sends much waits for itself, not others for it. The engine does the same with whoever waits inside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, count

from sllmctl.gateway.journal import Sequence

__all__ = ["Line"]


class _Tenant:
    """One tenant's part of the line, each sequence with the number of its arrival."""

    __slots__ = ("served", "waiting")

    def __init__(self, served: int) -> None:
        self.served = served
        self.waiting: OrderedDict[Sequence, int] = OrderedDict()


class Line:
    """Adding and taking cost nothing that grows with the line; looking who is first grows with the tenants in it."""

    def __init__(self) -> None:
        self._returned: OrderedDict[Sequence, None] = OrderedDict()
        self._tenants: dict[str, _Tenant] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._returned) + sum(len(tenant.waiting) for tenant in self._tenants.values())

    def __bool__(self) -> bool:
        return bool(self._returned or self._tenants)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._returned, *(tenant.waiting for tenant in self._tenants.values()))

    def __contains__(self, sequence: Sequence) -> bool:
        tenant = self._tenants.get(sequence.request.tenant)
        return sequence in self._returned or (tenant is not None and sequence in tenant.waiting)

    def add(self, sequence: Sequence, *, front: bool = False) -> None:
        """Last of its tenant's; or before everybody."""
        if front:
            self._returned[sequence] = None
            self._returned.move_to_end(sequence, last=False)
            return
        name = sequence.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            least = min((other.served for other in self._tenants.values()), default=0)
            tenant = self._tenants[name] = _Tenant(least)
        tenant.waiting[sequence] = next(self._arrivals)

    def first(self) -> Sequence:
        """Whose turn it is; somebody must be there."""
        if self._returned:
            return next(iter(self._returned))
        tenant = min(self._tenants.values(), key=lambda each: (each.served, next(iter(each.waiting.values()))))
        return next(iter(tenant.waiting))

    def remove(self, sequence: Sequence, served_tokens: int = 0) -> None:
        """One that is there leaves, ``served_tokens`` being charged to its tenant."""
        if sequence in self._returned:
            del self._returned[sequence]
            return
        tenant = self._tenants[sequence.request.tenant]
        tenant.served += served_tokens
        del tenant.waiting[sequence]
        if not tenant.waiting:
            del self._tenants[sequence.request.tenant]
