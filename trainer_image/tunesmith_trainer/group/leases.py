"""Who writes into a run's folders: two runs that write to the same ones would damage each other's files.

A lease is a small document in the folder, renewed while its run lives. No clocks are compared: who finds a lease of
another run looks whether it is renewed. No store has to write on conditions: of two runs that take a folder in the same
moment the later has it, and the other finds out before it writes a checkpoint or a model. Used by `driver`;
`checkpointer` and `finish` look again.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith_api.artifacts import RunLease
from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import Failure, UserError
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.loop.output_folder import LEASE, check_output, find_lease, is_begun, name_of

__all__ = ["RENEW_SECONDS", "FolderLease", "held_leases", "lease_of"]

RENEW_SECONDS = 15.0
MISSED = 4
"""Renewals that a run misses before it counts as gone."""
LAST_RENEWALS = 5
"""Those that a job's predecessor of the same name is given: its pods may live on for a minute once it is deleted."""

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
    is_lost: bool = False
    """Whether another process has taken the folder over."""

    def wait(self) -> None:
        """Wait until no other run holds the lease.

        Raises:
            UserError: another run lives, and holds it.
        """
        seen = self._held()
        if seen is None:
            return
        self.log(f"{self.uri}: {name_of(seen)} did not say that it has ended: looking for a minute if it still lives")
        missed = renewed = 0
        while missed < MISSED:
            self.sleep(RENEW_SECONDS)
            now = self._held()
            if now is None:
                return
            if now == seen:
                missed += 1
                continue
            seen, missed, renewed = now, 0, renewed + 1
            is_namesake = name_of(now) == name_of(self.mine)
            if renewed > (LAST_RENEWALS if is_namesake else 0):
                who = f"another {name_of(now)}" if is_namesake else name_of(now)
                message = (
                    f"{self.field}: {who} is running and writes into {self.uri}, too: wait until it has ended, or "
                    "give this run a folder of its own. The folder is free as soon as that run ends, and "
                    f"{MISSED * RENEW_SECONDS:.0f} seconds after its last sign of life where it is killed"
                )
                raise UserError(Reason.FOLDER_IN_USE, message)

    def take(self) -> None:
        """Take the lease, that of an earlier attempt of the same job, too."""
        self._write()

    def renew(self) -> None:
        """Show that the run lives."""
        found = find_lease(self.store, self.uri)
        if found is not None and not found.released and not self._is_of_this_process(found):
            if not self.is_lost:
                self.is_lost = True
                self.log(f"warning: {self.uri} was taken over by {name_of(found)}")
            return
        self.is_lost = False
        self.mine = self.mine.model_copy(update={"renewals": self.mine.renewals + 1})
        self._write()

    def release(self, keep: bool = False) -> None:
        """Give the folder free; with `keep`, say whose the files are that lie there."""
        found = find_lease(self.store, self.uri)
        if found is None or not self._is_of_this_process(found):
            return
        if keep:
            self.mine = self.mine.model_copy(update={"released": True})
            self._write()
        else:
            self.store.delete(f"{self.uri.rstrip('/')}/{LEASE}")

    def _write(self) -> None:
        self.store.put_bytes(f"{self.uri.rstrip('/')}/{LEASE}", self.mine.to_json().encode())

    def _held(self) -> RunLease | None:
        """Return another run's lease, unless that run has ended. A job's own is no obstacle to its next attempt."""
        found = find_lease(self.store, self.uri)
        return None if found is None or found.uid == self.mine.uid or _has_ended(found) else found

    def _is_of_this_process(self, lease: RunLease) -> bool:
        return (lease.uid, lease.host, lease.pid) == (self.mine.uid, self.mine.host, self.mine.pid)


def _has_ended(lease: RunLease) -> bool:
    """Whether a run has said that it ended, or its process is gone from where this one is."""
    return lease.released or (lease.host == _host() != "" and not Path(f"/proc/{lease.pid}").exists())


def _host() -> str:
    """Name the place in which numbers of processes mean the same; "" where that can't be told, as in some sandboxes.

    A pod's hostname is that of the pod before it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def lease_of(plan: TrainingPlan, run_digest: str) -> RunLease:
    """Return what this process leaves where it writes."""
    host, pid = _host(), os.getpid()
    return RunLease(
        run_digest=run_digest,
        uid=plan.uid or f"{host or uuid.uuid4()} {pid}",
        name=plan.name,
        namespace=plan.namespace,
        host=host,
        pid=pid,
    )


@contextmanager
def held_leases(store: ObjectStore, plan: TrainingPlan, run_digest: str, log: Log) -> Iterator[None]:
    """Hold the folders of checkpoints and output while a run lives.

    Raises:
        UserError: another run writes there, or has just put its model there.
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
    # none is taken before both are free: what isn't renewed yet would be taken for a dead run's
    checkpoints.wait()
    output.wait()
    check_output(store, plan, run_digest)  # once more: the run that was waited for may have published meanwhile
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
