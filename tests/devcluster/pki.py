"""The certificates and kubeconfigs of one cluster: a throw-away authority with elliptic-curve keys, made at once."""

import datetime
import ipaddress
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs the cluster's certificates and leaves them, with the authority's own ``ca.crt``, in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.certificate_file = folder / "ca.crt"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "devcluster-ca")])
        self._key = ec.generate_private_key(ec.SECP256R1())
        usage = _key_usage(authority=True)
        builder = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        certificate = builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.pair_of_authority = self._write("ca", certificate, self._key)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        # A minute of grace for clocks that are corrected meanwhile.
        return builder.not_valid_before(now - datetime.timedelta(minutes=1)).not_valid_after(now + LIFETIME)

    def client(self, name: str, common_name: str, organization: str | None = None) -> Pair:
        """A certificate with which ``common_name`` (a user, of the group ``organization``) calls the API server."""
        return self._sign(name, common_name, organization, [ExtendedKeyUsageOID.CLIENT_AUTH], [], [])

    def server(self, name: str, common_name: str, dns_names: Sequence[str], addresses: Sequence[str]) -> Pair:
        """A serving certificate for these names and IP addresses."""
        return self._sign(name, common_name, None, [ExtendedKeyUsageOID.SERVER_AUTH], dns_names, addresses)

    def _sign(
        self,
        name: str,
        common_name: str,
        organization: str | None,
        usages: list[x509.ObjectIdentifier],
        dns_names: Sequence[str],
        addresses: Sequence[str],
    ) -> Pair:
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        if organization:
            attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(x509.Name(attributes), key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if dns_names or addresses:
            names: list[x509.GeneralName] = [x509.DNSName(entry) for entry in dns_names]
            names += [x509.IPAddress(ipaddress.ip_address(entry)) for entry in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return self._write(name, builder.sign(self._key, hashes.SHA256()), key)

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(pair.key, key)
        return pair

    def signing_key(self, name: str) -> Pair:
        """A bare key pair (the ``certificate`` is the public key): what signs ServiceAccount tokens."""
        key = ec.generate_private_key(ec.SECP256R1())
        pair = Pair(self.folder / f"{name}.pub", self.folder / f"{name}.key")
        public = serialization.PublicFormat.SubjectPublicKeyInfo
        pair.certificate.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, public))
        _write_key(pair.key, key)
        return pair

    def kubeconfig(self, path: Path, server: str, client: Pair) -> Path:
        """A kubeconfig (JSON, which is YAML) with everything embedded, so that it can be copied elsewhere."""
        user = {
            "client-certificate-data": _base64(client.certificate),
            "client-key-data": _base64(client.key),
        }
        cluster = {"server": server, "certificate-authority-data": _base64(self.certificate_file)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "devcluster", "cluster": cluster}],
            "users": [{"name": "devcluster", "user": user}],
            "contexts": [{"name": "devcluster", "context": {"cluster": "devcluster", "user": "devcluster"}}],
            "current-context": "devcluster",
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1) + "\n")
        return path


def _base64(path: Path) -> str:
    return b64encode(path.read_bytes()).decode()


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    encoding, traditional = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    path.write_bytes(key.private_bytes(encoding, traditional, serialization.NoEncryption()))


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
