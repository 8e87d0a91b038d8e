"""Who writes into a run's folders: two runs that write to the same ones would damage each other's files.

A lease is a small document in the folder, renewed while its run lives. No clocks are compared: who finds a lease of
another run looks whether it is renewed. Used by `driver`; `finish` looks once more before it publishes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith_api.artifacts import RunLease
from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import Failure, UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.loop.output_folder import LEASE, find_lease, is_begun

__all__ = ["RENEW_SECONDS", "FolderLease", "held_leases", "lease_of"]

RENEW_SECONDS = 15.0
MISSED = 4
"""Renewals that a run misses before it counts as gone."""

Log = Callable[..., None]


@dataclass
class FolderLease:
    """One run's right to write into one folder."""

    store: ObjectStore
    uri: str
    field: str
    """The spec's name of the folder, for messages."""
    mine: RunLease
    log: Log = print
    sleep: Callable[[float], None] = time.sleep

    def take(self) -> None:
        """Take the lease once no other run holds it.

        Raises:
            UserError: another run lives, and holds it.
        """
        found = find_lease(self.store, self.uri)
        if found is not None and self._is_foreign(found) and not _has_ended(found):
            who = f"{found.namespace}/{found.name}"
            self.log(f"{self.uri} was written by {who}, which did not say that it has ended: looking if it still lives")
            for _ in range(MISSED):
                self.sleep(RENEW_SECONDS)
                now = find_lease(self.store, self.uri)
                if now is None or not self._is_foreign(now) or _has_ended(now):
                    break
                if now != found:
                    message = (
                        f"{self.field}: {who} is running and writes into {self.uri}, too: wait until it has ended, or "
                        "give this run a folder of its own"
                    )
                    raise UserError(Reason.FOLDER_IN_USE, message)
        self._write()

    def renew(self) -> None:
        """Show that the run lives."""
        found = find_lease(self.store, self.uri)
        if found is not None and self._is_foreign(found) and not found.released:
            return  # it was given up for dead
        self.mine = self.mine.model_copy(update={"renewals": self.mine.renewals + 1})
        self._write()

    def release(self, keep: bool = False) -> None:
        """Give the folder free; with `keep`, say whose the files are that lie there."""
        found = find_lease(self.store, self.uri)
        if found is None or self._is_foreign(found):
            return
        if keep:
            self.mine = self.mine.model_copy(update={"released": True})
            self._write()
        else:
            self.store.delete(f"{self.uri.rstrip('/')}/{LEASE}")

    def _write(self) -> None:
        self.store.put_bytes(f"{self.uri.rstrip('/')}/{LEASE}", self.mine.to_json().encode())

    def _is_foreign(self, lease: RunLease) -> bool:
        return lease.uid != self.mine.uid


def _has_ended(lease: RunLease) -> bool:
    """Whether a run has said that it ended, or its process is gone from where this one is."""
    return lease.released or (lease.host == _host() and not Path(f"/proc/{lease.pid}").exists())


def _host() -> str:
    """Name the place in which numbers of processes mean the same: a pod's hostname is that of the pod before it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def lease_of(plan: TrainingPlan, run_digest: str) -> RunLease:
    """Return what this process leaves where it writes."""
    host, pid = _host(), os.getpid()
    return RunLease(
        run_digest=run_digest,
        uid=plan.uid or f"{host} {pid}",
        name=plan.name,
        namespace=plan.namespace,
        host=host,
        pid=pid,
    )


@contextmanager
def held_leases(store: ObjectStore, plan: TrainingPlan, run_digest: str, log: Log) -> Iterator[None]:
    """Hold the folders of checkpoints and output while a run lives.

    Raises:
        UserError: another run writes there.
        Retryable: the store can't be reached.
    """
    mine = lease_of(plan, run_digest)
    checkpoints = FolderLease(store, plan.checkpoint_uri, "spec.checkpoint.uri", mine, log)
    output = FolderLease(store, plan.output_uri, "spec.output.uri", mine, log)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            for lease in (checkpoints, output):
                with suppress(Failure):  # the store is away: training itself will say so
                    lease.renew()

    thread = threading.Thread(target=renew, name="leases", daemon=True)
    try:
        checkpoints.take()
        output.take()
        thread.start()
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join(5)
        with suppress(Failure):
            checkpoints.release()
            output.release(keep=is_begun(store, plan.output_uri))
