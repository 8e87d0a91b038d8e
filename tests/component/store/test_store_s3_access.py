"""Stores as people have them: a certificate of their own, buckets in host names, refusals under other names."""

import asyncio
import ssl
import threading
from contextlib import contextmanager

import boto3
import pytest
from botocore.exceptions import ClientError

from devcluster.pki import Authority
from tunesmith_api.keys import ENV_CA_BUNDLE, ExitCode, Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.common import AddressingStyle
from tunesmith_store.errors import UserError
from tunesmith_store.store import S3Store, _translated


@pytest.fixture
def credentials(object_store, monkeypatch):
    for name, value in object_store.credentials.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(ENV_CA_BUNDLE, raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials


async def _copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextmanager
def tls_in_front_of(port, authority):
    """The same store behind TLS: yields its https:// address."""
    pair = authority.server("store", "store", ["localhost"], ["127.0.0.1"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []

    async def relay(reader, writer):
        near, far = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, far), _copy(near, writer), return_exceptions=True)

    async def listen():
        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        found.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run():
        loop.create_task(listen())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"https://localhost:{found[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_a_store_with_a_certificate_of_ones_own_is_trusted_by_its_authority_only(
    object_store, bucket, credentials, monkeypatch, tmp_path
):
    authority = Authority(tmp_path / "pki")
    with tls_in_front_of(object_store.ports["s3"], authority) as url:
        with pytest.raises(UserError, match=r"certificate is not trusted.*spec\.storage\.caBundleRef") as refused:
            S3Store(StoragePlan(endpoint_url=url)).put_bytes(f"{bucket}/a", b"1")
        assert (refused.value.reason, refused.value.exit_code) == (Reason.STORAGE_UNWRITABLE, ExitCode.STORAGE_DENIED)
        monkeypatch.setenv(ENV_CA_BUNDLE, str(authority.certificate_file))
        store = S3Store(StoragePlan(endpoint_url=url))
        store.put_bytes(f"{bucket}/a", b"1")
        assert store.get_bytes(f"{bucket}/a") == b"1"


def test_a_bundle_that_is_not_there_is_named(credentials, monkeypatch, tmp_path):
    monkeypatch.setenv(ENV_CA_BUNDLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"create the ConfigMap that spec\.storage\.caBundleRef names"):
        S3Store(StoragePlan(endpoint_url="https://store"))


@pytest.mark.parametrize(("status", "code"), [(403, "SecondLevelDomainForbidden"), (401, "NoAuth"), (301, "Moved")])
def test_a_refusal_by_any_name_ends_the_job(status, code):
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with (
        pytest.raises(UserError, match=rf"{code} \(no\).*spec\.storage\.addressingStyle"),
        _translated("s3://b/k", "read"),
    ):
        raise ClientError(answer, "GetObject")


@pytest.mark.parametrize(
    ("style", "endpoint", "url"),
    [
        (AddressingStyle.AUTO, "http://store:8333", "http://store:8333/bucket/key"),
        (AddressingStyle.PATH, "http://store:8333/base", "http://store:8333/base/bucket/key"),
        (AddressingStyle.VIRTUAL, "http://store:8333", "http://bucket.store:8333/key"),
        (AddressingStyle.AUTO, None, "https://bucket.s3.amazonaws.com/key"),
        (AddressingStyle.PATH, None, "https://s3.amazonaws.com/bucket/key"),
    ],
)
def test_the_bucket_stands_where_the_store_wants_it(credentials, style, endpoint, url):
    store = S3Store(StoragePlan(endpoint_url=endpoint, addressing_style=style))
    made = store._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    assert made.partition("?")[0] == url
