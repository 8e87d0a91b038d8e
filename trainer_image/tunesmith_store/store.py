"""Object storage as pods need it: a small protocol, and S3 behind it. `volumes` and `hub` are the other two.

Used by all that reads or writes checkpoints, models and quantized artefacts. Errors come out as `UserError` (the user
can fix it: a missing bucket, refused credentials) or `Retryable` (the store can't be reached just now), never as a
client library's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.common import AddressingStyle
from tunesmith_store.errors import Retryable, UserError

__all__ = ["NotFound", "ObjectInfo", "ObjectStore", "S3Store", "split_uri"]


MOST_CONNECTIONS = 8
"""For one file."""


class NotFound(Exception):
    """There is no such object."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object: its full URI, its size in bytes, and a tag that changes with its content."""

    uri: str
    size: int
    tag: str


class ObjectStore(Protocol):
    """What is asked of a store. URIs are `s3://bucket/key`, `pvc://claim/path` or `hf://owner/name/path`."""

    def list(self, uri: str) -> list[ObjectInfo]:
        """Return all objects below a folder, sorted by URI."""

    def head(self, uri: str) -> ObjectInfo:
        """Return one object's facts. Raises NotFound."""

    def get_bytes(self, uri: str) -> bytes:
        """Return a small object's content. Raises NotFound."""

    def get_range(self, uri: str, start: int, size: int) -> bytes:
        """Return `size` bytes from byte `start` on; fewer, or none, where the object ends before. Raises NotFound."""

    def download(self, uri: str, path: Path) -> None:
        """Copy an object to a file. Raises NotFound."""

    def put_bytes(self, uri: str, data: bytes) -> None:
        """Write a small object; all of it appears at once."""

    def upload(self, path: Path, uri: str) -> None:
        """Copy a file to an object; all of it appears at once."""

    def delete(self, uri: str) -> None:
        """Remove an object, if it exists."""


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key (without a leading or trailing slash)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key.strip("/")


def _is_marker(key: str, size: int) -> bool:
    """Whether an object only makes a console or a file system show a folder; it has no content, and is no file."""
    return key.endswith("/") or (size == 0 and key.endswith("_$folder$"))


MISSING = {"NoSuchKey", "404", "NotFound"}
PAST_THE_END = {"InvalidRange", "416"}
DENIED = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "AllAccessDisabled",
    "AccountProblem",
    "InvalidBucketName",
    "AuthorizationHeaderMalformed",
}
REFUSED = {301, 401, 403}
"""HTTP statuses that another try doesn't change, whatever a store calls them."""


@contextmanager
def _translated(uri: str, verb: str) -> Iterator[None]:
    """Turn boto3's errors into ours. `verb` is read, list, write or delete."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, SSLError

    reason = Reason.STORAGE_UNREADABLE if verb in {"read", "list"} else Reason.STORAGE_UNWRITABLE
    bucket = split_uri(uri)[0]
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        message = (
            f"no credentials to {verb} {uri}: put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into the Secret named by "
            "spec.storage.secretRef"
        )
        raise UserError(reason, message, ExitCode.STORAGE_DENIED) from error
    except (ClientError, Boto3Error) as error:
        cause = error if isinstance(error, ClientError) else error.__cause__ or error.__context__
        answer = cause.response.get("Error", {}) if isinstance(cause, ClientError) else {}
        status = (
            cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(cause, ClientError) else None
        )
        code, text = str(answer.get("Code", "")), str(answer.get("Message", "") or error)
        if code == "NoSuchBucket":
            message = f"can't {verb} {uri}: bucket {bucket!r} does not exist; create it or correct the URI"
            raise UserError(reason, message, ExitCode.STORAGE_DENIED) from error
        if code in MISSING:
            raise NotFound(uri) from error
        if code in DENIED or status in REFUSED:
            message = (
                f"can't {verb} {uri}: the store answered {code} ({text}); check the keys in the Secret named by "
                f"spec.storage.secretRef, that they may {verb} in bucket {bucket!r}, and spec.storage.addressingStyle"
            )
            raise UserError(reason, message, ExitCode.STORAGE_DENIED) from error
        message = f"can't {verb} {uri}: {f'{code} {text}'.strip()}; check the store behind spec.storage.endpointURL"
        raise Retryable(message, Reason.STORAGE_UNREACHABLE) from error
    except SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" not in str(error):
            raise Retryable(f"can't {verb} {uri}: {error}", Reason.STORAGE_UNREACHABLE) from error
        message = (
            f"can't {verb} {uri}: the store's certificate is not trusted ({error}); put the authority that signed it "
            "into a ConfigMap and name that in spec.storage.caBundleRef"
        )
        raise UserError(reason, message, ExitCode.STORAGE_DENIED) from error
    except BotoCoreError as error:
        message = f"can't {verb} {uri}: {error}; check spec.storage.endpointURL and the network"
        raise Retryable(message, Reason.STORAGE_UNREACHABLE) from error


def _addressing(plan: StoragePlan) -> Any:
    if plan.addressing_style is AddressingStyle.AUTO:
        return {"addressing_style": "path"} if plan.endpoint_url else {}
    return {"addressing_style": plan.addressing_style.value.lower()}


class S3Store:
    """An S3-compatible store. Large files travel in parts, several at once. Safe to share between threads."""

    def __init__(self, plan: StoragePlan) -> None:
        """Credentials come from the environment, in boto3's usual order.

        Raises:
            UserError: the file of certificate authorities that the environment names isn't there.
        """
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        authorities = os.environ.get(keys.ENV_CA_BUNDLE)
        if authorities and not os.path.isfile(authorities):
            message = (
                f"{authorities} isn't there: create the ConfigMap that spec.storage.caBundleRef names, with its key"
            )
            raise UserError(Reason.STORAGE_UNREADABLE, message, ExitCode.STORAGE_DENIED)
        config = Config(
            retries={"max_attempts": 5, "mode": "standard"},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            s3=_addressing(plan),
            # checksums on by default break some S3-compatible stores; our manifests carry sha256 anyway
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._client: Any = boto3.client("s3", endpoint_url=plan.endpoint_url, region_name=plan.region, config=config)
        # larger chunks than boto3's cost a third less CPU, which a training process has none to spare of, and each
        # connection is a thread: more of them than there are cores only take the interpreter's lock from each other
        cores = len(os.sched_getaffinity(0))
        self._transfer = TransferConfig(
            multipart_threshold=32 << 20,
            multipart_chunksize=32 << 20,
            max_concurrency=min(MOST_CONNECTIONS, max(2, cores)),
            io_chunksize=1 << 20,
        )

    def list(self, uri: str) -> list[ObjectInfo]:
        bucket, key = split_uri(uri)
        prefix = f"{key}/" if key else ""
        found: list[ObjectInfo] = []
        with _translated(uri, "list"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if _is_marker(item["Key"], item["Size"]):
                        continue
                    found.append(ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"')))
        return sorted(found, key=lambda info: info.uri)

    def head(self, uri: str) -> ObjectInfo:
        bucket, key = split_uri(uri)
        with _translated(uri, "read"):
            answer = self._client.head_object(Bucket=bucket, Key=key)
        if answer["ContentLength"] == 0 and answer.get("ContentType", "").startswith("application/x-directory"):
            raise NotFound(uri)
        return ObjectInfo(uri, answer["ContentLength"], answer["ETag"].strip('"'))

    def get_bytes(self, uri: str) -> bytes:
        bucket, key = split_uri(uri)
        with _translated(uri, "read"):
            return bytes(self._client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def get_range(self, uri: str, start: int, size: int) -> bytes:
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        with _translated(uri, "read"):
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in PAST_THE_END:
                    return b""
                raise
            return bytes(answer["Body"].read())

    def download(self, uri: str, path: Path) -> None:
        bucket, key = split_uri(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _translated(uri, "read"):
            self._client.download_file(bucket, key, str(path), Config=self._transfer)

    def put_bytes(self, uri: str, data: bytes) -> None:
        bucket, key = split_uri(uri)
        with _translated(uri, "write"):
            self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def upload(self, path: Path, uri: str) -> None:
        bucket, key = split_uri(uri)
        with _translated(uri, "write"):
            self._client.upload_file(str(path), bucket, key, Config=self._transfer)

    def delete(self, uri: str) -> None:
        bucket, key = split_uri(uri)
        with _translated(uri, "delete"):
            self._client.delete_object(Bucket=bucket, Key=key)
