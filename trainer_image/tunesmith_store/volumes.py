"""PersistentVolumeClaims as object storage: `pvc://claim/path` is a file below the folder where the claim is mounted.

`router` uses it for pods and for the command line; tests use it in place of S3. A file appears under its name when all
of it is on disk, so that "manifest last" means the same here as in a bucket.
"""

# ruff: noqa: D102 - the methods are documented once, on the protocol

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import FULL, Retryable, UserError
from tunesmith_store.store import NotFound, ObjectInfo

__all__ = ["VolumeStore", "in_place", "loadable", "volumes_root"]

PART = ".tunesmith-part-"
"""Beginning of the name of a file that is being written. Never listed."""

DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def volumes_root() -> Path:
    """Return the folder below which claims are mounted, each under its name."""
    return Path(os.environ.get(keys.ENV_VOLUMES) or keys.VOLUMES_DIRECTORY)


def in_place(uri: str) -> Path | None:
    """Return the folder of a `pvc://` URI where its claim is mounted; None for other URIs, and where there is none."""
    scheme, _, path = uri.partition("://")
    parts = [part for part in path.split("/") if part]
    folder = volumes_root().joinpath(*parts)
    return folder if scheme == "pvc" and ".." not in parts and folder.is_dir() else None


def loadable(uri: str) -> str | None:
    """Return what `from_pretrained` takes for a model's URI; None where its folder has to be copied first.

    That is a name on the Hub, or a path of this machine in a local run, where claims are links. A pod's paths are of no
    use to others.
    """
    scheme, _, path = uri.partition("://")
    if scheme == "hf":
        return path.strip("/")
    folder = in_place(uri)
    is_local = folder is not None and (volumes_root() / path.partition("/")[0]).is_symlink()
    return str(folder.resolve()) if folder is not None and is_local else None


@contextmanager
def _translated(uri: str, verb: str) -> Iterator[None]:
    """Turn the operating system's errors into ours. `verb` is read, list, write or delete."""
    reason = Reason.STORAGE_UNREADABLE if verb in {"read", "list"} else Reason.STORAGE_UNWRITABLE
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(uri) from error
    except OSError as error:
        if error.errno in DENIED:
            message = (
                f"can't {verb} {uri}: {error.strerror}; check the volume's access mode and that user {os.getuid()} "
                f"may {verb} there (fsGroup, or the owner of its folders)"
            )
            raise UserError(reason, message, ExitCode.STORAGE_DENIED) from error
        if error.errno in FULL and verb == "read":
            raise  # it's the disk that is written to
        if error.errno in FULL:
            message = f"can't {verb} {uri}: the volume is full; make the PersistentVolumeClaim larger"
            raise UserError(Reason.DISK_FULL, message, ExitCode.STORAGE_DENIED) from error
        raise Retryable(f"can't {verb} {uri}: {error}", reason) from error


class VolumeStore:
    """A folder of mounted claims. Safe to share between threads, and with other pods on the same volume."""

    def __init__(self, root: Path | None = None) -> None:
        """`root` holds one folder per claim; leave it out for the pod's (`volumes_root`)."""
        self._root = root if root is not None else volumes_root()

    def _claim(self, uri: str) -> tuple[str, Path]:
        """Return `pvc://claim` and the claim's folder."""
        scheme, _, rest = uri.partition("://")
        name = rest.partition("/")[0]
        folder = self._root / name
        with _translated(uri, "read"):
            mounted = bool(name) and folder.is_dir()
        if not mounted:
            message = f"{uri}: there is no volume {name!r} in this pod; correct the claim's name in the URI"
            raise UserError(Reason.STORAGE_UNREADABLE, message, ExitCode.STORAGE_DENIED)
        return f"{scheme}://{name}", folder

    def _path(self, uri: str) -> Path:
        claim, folder = self._claim(uri)
        parts = [part for part in uri.removeprefix(claim).split("/") if part]
        if ".." in parts:
            raise UserError(Reason.STORAGE_UNREADABLE, f"{uri}: a path in a volume can't go up with '..'")
        return folder.joinpath(*parts)

    def list(self, uri: str) -> list[ObjectInfo]:
        claim, folder = self._claim(uri)
        found: list[ObjectInfo] = []

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # S3, too, has nothing there then
                raise error

        with _translated(uri, "list"):
            for where, _, names in os.walk(self._path(uri), onerror=refuse):
                for name in names:
                    if not name.startswith(PART):
                        with suppress(FileNotFoundError):  # deleted meanwhile, or a dangling link
                            found.append(_info(claim, folder, Path(where, name)))
        return sorted(found, key=lambda info: info.uri)

    def head(self, uri: str) -> ObjectInfo:
        claim, folder = self._claim(uri)
        path = self._path(uri)
        with _translated(uri, "read"):
            if not path.is_file():
                raise NotFound(uri)
            return _info(claim, folder, path)

    def get_bytes(self, uri: str) -> bytes:
        with _translated(uri, "read"):
            return self._path(uri).read_bytes()

    def get_range(self, uri: str, start: int, size: int) -> bytes:
        with _translated(uri, "read"), self._path(uri).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def download(self, uri: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translated(uri, "read"):
            shutil.copyfile(self._path(uri), path)

    def put_bytes(self, uri: str, data: bytes) -> None:
        with self._written(uri) as part:
            part.write_bytes(data)

    def upload(self, path: Path, uri: str) -> None:
        with self._written(uri) as part:
            shutil.copyfile(path, part)

    @contextmanager
    def _written(self, uri: str) -> Iterator[Path]:
        """Yield a path beside the target; what is written there takes the target's name once it is on disk."""
        target = self._path(uri)
        part = target.with_name(f"{PART}{uuid.uuid4().hex}")
        try:
            with _translated(uri, "write"):
                _make(part)
                yield part
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(target)
        except NotFound as error:
            message = f"can't write {uri}: a file stands where a folder has to be; remove it or correct the URI"
            raise UserError(Reason.STORAGE_UNWRITABLE, message, ExitCode.STORAGE_DENIED) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def delete(self, uri: str) -> None:
        _, folder = self._claim(uri)
        path = self._path(uri)
        with suppress(NotFound), _translated(uri, "delete"):
            path.unlink()
        # a bucket has no empty folders either; one that others have just written to is not empty
        with suppress(OSError):
            for parent in path.parents:
                if parent == folder:
                    break
                parent.rmdir()


def _make(file: Path, attempts: int = 50) -> None:
    """Make an empty file and its folder, which another pod may be removing just now, since it was empty."""
    for attempt in range(attempts):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            return
        except (FileNotFoundError, FileExistsError):  # the second: it was there, and a moment later it wasn't
            if attempt == attempts - 1 or file.parent.is_file():
                raise


def _info(claim: str, folder: Path, path: Path) -> ObjectInfo:
    stat = path.stat()
    tag = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
    return ObjectInfo(f"{claim}/{path.relative_to(folder).as_posix()}", stat.st_size, tag)
