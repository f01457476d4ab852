"""The server's certificate authority: ECDSA P-256 keys and X.509 certificates (RFC 5280)."""

from __future__ import annotations

import ipaddress
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reticent.core.errors import ProvisionError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
WARNING_DAYS = 30
_BACK = timedelta(minutes=5)  # for devices whose clock is a little behind
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM; the key must stay on the server.

    Attributes:
        certificate: The certificate.
        key: Its unencrypted PKCS8 private key.
    """

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        """Show nothing of the key."""
        return "Issued(...)"


def make_authority(now: datetime) -> Issued:
    """Return a new certificate authority: it signs servers' certificates and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities must not share a name, or a client that trusts one looks for the wrong key.
    name = _name(f"reticent CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _issued(certificate, key)


def make_server(authority: Issued, hosts: list[str], now: datetime) -> Issued:
    """Return a certificate for a TLS server of these names and addresses, by ``authority``.

    It does not outlive the authority.

    Raises:
        ProvisionError: If a host is neither a name nor an address, or the authority has expired or
            is damaged.
    """
    ca = read_certificate(authority.certificate, "the authority's certificate")
    if now >= ca.not_valid_after_utc:
        raise ProvisionError(
            f"the certificate authority expired on {ca.not_valid_after_utc:%Y-%m-%d}: make a new "
            "server with `reticent server init` and enroll the devices again"
        )
    signer = read_authority_key(authority, "the authority's key")
    key = ec.generate_private_key(ec.SECP256R1())
    days = min(SERVER_DAYS, (ca.not_valid_after_utc - now).days)
    builder = _builder(_name(hosts[0][:64]), ca.subject, key.public_key(), now, days)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative_names(hosts)), critical=False)
        .add_extension(issuer, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _issued(certificate, key)


def make_node_key() -> tuple[str, str]:
    """Return an ECDSA P-384 key pair as OpenSSH texts: private, and public on one line."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return private.decode(), public.decode()


def alternative_names(hosts: list[str], where: str = "--host") -> list[x509.GeneralName]:
    """Return the hosts as subject alternative names; addresses as such, and not as names.

    Args:
        hosts: Names and addresses.
        where: Where they were given, for errors.

    Raises:
        ProvisionError: If there is none, or one is neither a name nor an address that a SuperLink
            can be reached at.
    """
    if not hosts:
        raise ProvisionError(f"{where} must name the server at least once")
    return [_alternative(host, where) for host in hosts]


def _alternative(host: str, where: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(_address(host, where))
    except ValueError:
        pass
    labels = host.split(".")
    named = len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
    if not named or labels[-1].isdigit():
        raise ProvisionError(f"{where} {host!r}: must be a host name or an IP address")
    return x509.DNSName(host)


def _address(host: str, where: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an IP address that means the same on every machine."""
    found = ipaddress.ip_address(host)
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        raise ProvisionError(
            f"{where} {host!r}: must have no scope (%{found.scope_id}), which names an interface "
            "of one machine: give another address, or a host name"
        )
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        raise ProvisionError(f"{where} {host!r}: must be written as {found.ipv4_mapped}")
    if (kind := _unreachable(found)) is not None:
        raise ProvisionError(
            f"{where} {host!r}: is {kind}, at which no device reaches the server: give the address "
            "that it has in the devices' network, or a host name"
        )
    return found


def _unreachable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """Return what kind of address it is, if no connection from elsewhere can be made to it."""
    if address.is_unspecified:
        return "no address but all of a machine's own"
    if address.is_multicast:
        return "an address of a group"
    if address.is_link_local:
        return "a link-local address"
    return "the broadcast address" if address == _BROADCAST else None


def read_certificate(pem: bytes, where: Path | str) -> x509.Certificate:
    """Return a certificate.

    Raises:
        ProvisionError: If it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise ProvisionError(f"{where}: is not a certificate in PEM") from error


def read_authority_key(authority: Issued, where: Path | str) -> ec.EllipticCurvePrivateKey:
    """Return an authority's key.

    Raises:
        ProvisionError: If it cannot be read, or its certificate is of another key: no device would
            trust what it signs.
    """
    try:
        key = serialization.load_pem_private_key(authority.key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProvisionError(f"{where}: is not an unencrypted private key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ProvisionError(f"{where}: is not an elliptic curve key")
    certificate = read_certificate(authority.certificate, "the authority's certificate")
    if key.public_key() != certificate.public_key():
        raise ProvisionError(f"{where}: is not the key of the authority's certificate")
    return key


def expiry(pem: bytes, where: Path | str) -> datetime:
    """Return when a certificate ends."""
    return read_certificate(pem, where).not_valid_after_utc


def expiry_warning(what: str, expires: datetime, now: datetime, renew: str) -> str | None:
    """Return a warning if ``what`` expired or does within :data:`WARNING_DAYS`, else None."""
    if now >= expires:
        return f"{what} expired on {expires:%Y-%m-%d}: {renew}"
    days = (expires - now).days
    if days >= WARNING_DAYS:
        return None
    return f"{what} expires in {days} days, on {expires:%Y-%m-%d}: {renew}"


def utc_now() -> datetime:
    """Return the time, in UTC and to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Issued(certificate.public_bytes(serialization.Encoding.PEM), private)
