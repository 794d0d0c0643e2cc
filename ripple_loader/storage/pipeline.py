"""Keep read plans in order and a few buffers filled: the drive works while neurons are computed with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait

from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.reader import (
    Reader,
)


class Ticket:
    """Plans that a `Pipeline` runs together: waiting, or started and with a buffer."""

    def __init__(self, plans: Iterable[ReadPlan]) -> None:
        self.waiting = deque(plans)
        self.started: deque[tuple[ReadPlan, AlignedBuffer, list[Future[None]]]] = deque()


class Pipeline:
    """Runs read plans in the order they are added; as many are in flight or waiting for their use as there
    are buffers.

    Tickets are used in the order they were added, or dropped.

    Args:
        reader: does the reads.
        buffers: each holds any one plan.
    """

    def __init__(self, reader: Reader, buffers: Sequence[AlignedBuffer]) -> None:
        self._reader, self._free = reader, deque(buffers)
        self._tickets: deque[Ticket] = deque()

    def add(self, plans: Iterable[ReadPlan]) -> Ticket:
        """Queue some plans; their reads start as soon as there are buffers."""
        ticket = Ticket(plans)
        self._tickets.append(ticket)
        self._fill()
        return ticket

    def _fill(self) -> None:
        for ticket in self._tickets:
            while ticket.waiting and self._free:
                buffer = self._free.popleft()
                plan = ticket.waiting.popleft()
                ticket.started.append((plan, buffer, self._reader.submit(plan, buffer)))

    def take(self, ticket: Ticket) -> Iterator[tuple[ReadPlan, AlignedBuffer]]:
        """Each plan of a ticket with the buffer it was read into, which is valid until the next step."""
        while ticket.started:
            plan, buffer, reads = ticket.started[0]
            for read in reads:
                read.result()
            yield plan, buffer
            ticket.started.popleft()
            self._free.append(buffer)
            self._fill()
        assert not ticket.waiting

    def keep_started(self, ticket: Ticket) -> None:
        """Forget the plans of a ticket whose reads have not started."""
        ticket.waiting.clear()

    def drop(self, *tickets: Ticket) -> None:
        """Forget the unused plans of some tickets, after waiting for their reads in flight."""
        for ticket in tickets:
            ticket.waiting.clear()
        for ticket in tickets:
            while ticket.started:
                _, buffer, reads = ticket.started[0]
                wait(reads)
                ticket.started.popleft()
                self._free.append(buffer)
            if ticket in self._tickets:
                self._tickets.remove(ticket)
        self._fill()
