"""The Hugging Face Hub as an object store that can be read: `hf://owner/name/path`, `hf://datasets/owner/name/path`.

`router` uses it for models; `tunesmith_trainer.data` asks it which commit of a data set a run reads. A branch is
resolved to its commit once per process, so that all files of a run are of one state of the repository. The token comes
from the environment (HF_TOKEN).
"""

# ruff: noqa: D102 - the methods are documented once, on the protocol

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.store import NotFound, ObjectInfo

__all__ = ["TOKEN", "HubStore", "RepoPath", "is_network_error", "parse_hub_uri"]

T = TypeVar("T")

PAUSES = (0.5, 2.0, 5.0)
"""Seconds to wait before asking again, where the Hub didn't answer or was busy."""

TOKEN = "put HF_TOKEN into the Secret named by spec.huggingFace.secretRef"  # noqa: S105 - a sentence, no secret


@dataclass(frozen=True)
class RepoPath:
    """A repository of the Hub and a path in it ("" for its root)."""

    kind: str
    """`model` or `dataset`."""
    repo: str
    """`owner/name`, or a name alone."""
    path: str

    @property
    def base(self) -> str:
        """URI of the repository's root."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"


def parse_hub_uri(uri: str) -> RepoPath:
    """Split `hf://[datasets/]owner/name[/path]`. The Hub's first repositories have no owner: `hf://gpt2`."""
    rest = uri.removeprefix("hf://").strip("/")
    kind = "dataset" if rest.startswith("datasets/") else "model"
    owner, _, rest = rest.removeprefix("datasets/").partition("/")
    name, _, path = rest.partition("/")
    return RepoPath(kind, f"{owner}/{name}" if name else owner, path)


def _refuse(place: RepoPath, message: str) -> NoReturn:
    reason = Reason.DATASET_NOT_FOUND if place.kind == "dataset" else Reason.MODEL_NOT_FOUND
    raise UserError(reason, f"{place.base}: {message}")


@contextmanager
def _translated(uri: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub and its HTTP client into ours."""
    from huggingface_hub import errors

    place = parse_hub_uri(uri)
    try:
        yield
    except errors.GatedRepoError:
        _refuse(place, f"the repository is gated: accept its conditions on the Hub, and {TOKEN}")
    except errors.RepositoryNotFoundError:
        _refuse(place, f"the Hub has no such repository, or it is private: correct the URI, or {TOKEN}")
    except errors.RevisionNotFoundError:
        field = "the data set's revision" if place.kind == "dataset" else "spec.model.revision"
        _refuse(place, f"there is no revision {revision!r}; correct {field}")
    except errors.LocalEntryNotFoundError as error:  # huggingface_hub's word for: not cached, and not to be reached
        message = f"can't read {uri}: {error}; check spec.huggingFace.endpointURL and the network"
        raise Retryable(message, Reason.STORAGE_UNREACHABLE) from error
    except errors.EntryNotFoundError as error:
        raise NotFound(uri) from error
    except (errors.FileMetadataError, errors.OfflineModeIsEnabled) as error:
        message = f"can't read {uri}: {error}; check spec.huggingFace.endpointURL and HF_HUB_OFFLINE"
        raise UserError(Reason.STORAGE_UNREADABLE, message, ExitCode.STORAGE_DENIED) from error
    except errors.HfHubHTTPError as error:
        _raise_for_answer(uri, place, error)
    except errors.HFValidationError as error:
        _refuse(place, f"the Hub has no repository of that name: {error}")
    except Exception as error:
        if not is_network_error(error):
            raise
        what = f"{type(error).__name__} {error}"
        message = f"can't read {uri}: {what}; check spec.huggingFace.endpointURL and the network"
        raise Retryable(message, Reason.STORAGE_UNREACHABLE) from error


def _raise_for_answer(uri: str, place: RepoPath, error: Any) -> NoReturn:
    status = error.response.status_code
    if status in {401, 403}:
        message = (
            f"{place.base}: the Hub refuses to show it ({status}): check the HF_TOKEN in the Secret named by "
            "spec.huggingFace.secretRef and what it may read"
        )
        raise UserError(Reason.STORAGE_UNREADABLE, message, ExitCode.STORAGE_DENIED) from error
    if status == 404:
        raise NotFound(uri) from error
    raise Retryable(f"can't read {uri}: the Hub answered {status}", Reason.STORAGE_UNREACHABLE) from error


def is_network_error(error: BaseException) -> bool:
    """Whether an error is the HTTP client's (whichever that is) or the socket's; a full disk is another matter."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return any(kind.__name__ in {"TransportError", "HTTPError"} for kind in type(error).__mro__)


def _ask(uri: str, revision: str | None, call: Callable[[], T]) -> T:
    """Ask the Hub, patiently."""
    for pause in PAUSES:
        try:
            with _translated(uri, revision):
                return call()
        except Retryable:
            time.sleep(pause)
    with _translated(uri, revision):
        return call()


class HubStore:
    """Repositories of the Hub, read only. Safe to share between threads."""

    def __init__(self, endpoint: str | None = None, revisions: Mapping[str, str | None] | None = None) -> None:
        """Prepare; nothing is asked yet.

        Args:
            endpoint: a mirror of the Hub; None for HF_ENDPOINT or the Hub itself.
            revisions: URI of a repository → commit, tag or branch to read; those not named are read at `main`.
        """
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._revisions = {
            parse_hub_uri(uri).base: revision for uri, revision in (revisions or {}).items() if uri.startswith("hf://")
        }
        self._commits: dict[tuple[str, str | None], str] = {}
        self._lock = threading.Lock()

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint)

    def commit(self, uri: str, revision: str | None = None) -> str:
        """Return the commit that `revision` (else the one given for this repository, else `main`) stands for.

        Raises:
            UserError: there is no such repository or revision, or it may not be read.
            Retryable: the Hub can't be reached.
        """
        place = parse_hub_uri(uri)
        revision = revision or self._revisions.get(place.base)
        key = (place.base, revision)
        with self._lock:
            if key not in self._commits:
                info = _ask(
                    uri, revision, lambda: self._api().repo_info(place.repo, revision=revision, repo_type=place.kind)
                )
                self._commits[key] = str(info.sha)
            return self._commits[key]

    def list(self, uri: str) -> list[ObjectInfo]:
        place, commit = parse_hub_uri(uri), self.commit(uri)

        def tree() -> list[ObjectInfo]:
            found = self._api().list_repo_tree(
                place.repo, place.path or None, recursive=True, revision=commit, repo_type=place.kind
            )
            return _infos(place, found)

        try:
            return sorted(_ask(uri, commit, tree), key=lambda info: info.uri)
        except NotFound:
            return []

    def head(self, uri: str) -> ObjectInfo:
        place, commit = parse_hub_uri(uri), self.commit(uri)

        def look() -> list[ObjectInfo]:
            return _infos(
                place,
                self._api().get_paths_info(place.repo, place.path, revision=commit, repo_type=place.kind),
            )

        found = _ask(uri, commit, look) if place.path else []
        if not found:
            raise NotFound(uri)
        return found[0]

    def get_bytes(self, uri: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="tunesmith-hub-") as folder:
            path = Path(folder) / "file"
            self.download(uri, path)
            return path.read_bytes()

    def get_range(self, uri: str, start: int, size: int) -> bytes:
        from huggingface_hub import HfFileSystem

        place, commit = parse_hub_uri(uri), self.commit(uri)
        files = HfFileSystem(endpoint=self._endpoint)
        path = f"{place.base.removeprefix('hf://')}@{commit}/{place.path}"
        return _ask(uri, commit, lambda: bytes(files.cat_file(path, start=start, end=start + size)))

    def download(self, uri: str, path: Path) -> None:
        place, commit = parse_hub_uri(uri), self.commit(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        # huggingface_hub leaves notes of its own beside what it downloads: they go with the folder
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".hub-") as folder:
            file = _ask(
                uri,
                commit,
                lambda: self._api().hf_hub_download(
                    place.repo, place.path, repo_type=place.kind, revision=commit, local_dir=folder
                ),
            )
            Path(file).replace(path)

    def put_bytes(self, uri: str, data: bytes) -> None:
        _read_only(uri)

    def upload(self, path: Path, uri: str) -> None:
        _read_only(uri)

    def delete(self, uri: str) -> None:
        _read_only(uri)


def _read_only(uri: str) -> NoReturn:
    message = f"{uri}: the Hub can't be written to; use s3://bucket/key or pvc://claim/path"
    raise UserError(Reason.STORAGE_UNWRITABLE, message, ExitCode.STORAGE_DENIED)


def _infos(place: RepoPath, entries: Iterable[Any]) -> list[ObjectInfo]:
    """Describe the files among the entries of a repository."""
    from huggingface_hub.hf_api import RepoFile

    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return [
        ObjectInfo(f"{place.base}/{file.path}", file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in files
    ]
