"""Certificates and keys in the formats that Flower wants, in one folder.

    ca.crt  ca.key                  the authority that all sides trust; ca.key never leaves
    server.crt  server.key          the server's, for the names and addresses it is called by
    clients/client-3  client-3.pub  client 3's: OpenSSH, on a NIST curve; the server needs the .pub

TLS proves the server to the clients, by ca.crt; a client proves itself by its key, whose public
half the server knows. Private files are for their owner alone (0600, in folders of 0700).
"""

import datetime
import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL = ("localhost", "127.0.0.1", "::1")  # the server's own processes call it by these
CURVE = ec.SECP384R1
AUTHORITY_DAYS = 3650  # at least: when it runs out, every client needs a new ca.crt
BACKDATED = datetime.timedelta(hours=1)  # for clocks that are behind
PRIVATE, PUBLIC = 0o600, 0o644


@dataclass(frozen=True)
class Keys:
    """Where each file lies in a folder of keys."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"

    def client(self, number: int) -> Path:
        """The private key of a client; its public one has .pub behind."""
        return self.folder / "clients" / f"client-{number}"

    def public_keys(self) -> dict[int, Path]:
        """The public keys of clients that are here, by number.

        Raises:
            ValueError: a file of clients/ is called as no client is.
        """
        found: dict[int, Path] = {}
        for path in sorted((self.folder / "clients").glob("*.pub")):
            number = path.stem.removeprefix("client-")
            if path.stem == number or not number.isdecimal() or str(int(number)) != number:
                raise ValueError(
                    f"{path} must be called client-NUMBER.pub, such as client-0.pub: the number "
                    f"tells whose key it is"
                )
            found[int(number)] = path
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Made:
    """What `make_keys` came to."""

    written: tuple[Path, ...]
    kept: tuple[Path, ...]  # were there already


def make_keys(
    folder: Path,
    hosts: Sequence[str] = (),
    clients: Iterable[int] = (),
    *,
    days: int = 365,
    force: bool = False,
) -> Made:
    """Make what is missing; what is there is kept, unless `force` asks for all of it anew.

    Args:
        hosts: names and addresses by which clients call the server; without any, neither an
            authority nor a server's certificate is made, as on a client's own machine.
        clients: numbers of the clients that get a key.
        days: for how long the server's certificate holds; the authority holds ten years.

    Raises:
        ValueError: nothing is asked for, an argument is out of range, a certificate that is there
            is not for all `hosts` or has run out, or half of a pair of files is there.
    """
    numbers = sorted(set(clients))
    if not hosts and not numbers:
        raise ValueError(
            "name what to make: the server's addresses (--host NAME), or clients (--clients N)"
        )
    if days < 1:
        raise ValueError(f"days must be at least 1, got {days}")
    if numbers and numbers[0] < 0:
        raise ValueError(f"clients must be numbers from 0, got {numbers[0]}")
    names = tuple(dict.fromkeys([*hosts, *LOCAL]))
    for name in names:
        _name(name)  # refused before anything is written
    keys = Keys(folder)
    written: list[Path] = []
    kept: list[Path] = []
    _make_folder(folder)
    if hosts:
        anew = force or not keys.ca.exists()
        if not anew:
            kept += [p for p in (keys.ca, keys.ca_key) if p.exists()]  # its key may be kept apart
        elif _wanted(keys.ca, keys.ca_key, kept, force):
            _make_authority(keys, max(days, AUTHORITY_DAYS))
            written += [keys.ca, keys.ca_key]
        # What another authority has signed holds no longer.
        if _wanted(keys.server, keys.server_key, kept, anew):
            _make_server(keys, names, days)
            written += [keys.server, keys.server_key]
        else:
            check_server(keys, names)
    if numbers:
        _make_folder(folder / "clients")
    for number in numbers:
        private = keys.client(number)
        public = private.with_suffix(".pub")
        if _wanted(private, public, kept, force):
            _make_client(private, public)
            written += [private, public]
    return Made(tuple(written), tuple(kept))


def check_server(keys: Keys, hosts: Iterable[str] = ()) -> datetime.datetime:
    """When the server's certificate runs out.

    Raises:
        FileNotFoundError: a file of the server's is missing.
        ValueError: the certificate has run out, is not for one of `hosts`, or the authority
            beside it did not sign it.
    """
    for path in (keys.ca, keys.server, keys.server_key):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: `fedmoe keys --out {keys.folder} --host ADDRESS` makes it"
            )
    certificate = _certificate(keys.server)
    try:
        certificate.verify_directly_issued_by(_certificate(keys.ca))
    except Exception as why:  # of several kinds, all of which say the same
        raise ValueError(
            f"{keys.server} was not signed by {keys.ca}: remove it and its key, and run "
            f"`fedmoe keys` again"
        ) from why
    ends = certificate.not_valid_after_utc
    if ends <= _now():
        raise ValueError(
            f"{keys.server} has run out on {ends:%Y-%m-%d}: remove it and its key, and run "
            f"`fedmoe keys` again"
        )
    known = names_of(certificate)
    for host in hosts:
        if host not in known:
            raise ValueError(
                f"{keys.server} is for {', '.join(known)}, not for {host}: remove it and its key, "
                f"and run `fedmoe keys --out {keys.folder} --host {host}` with all its names"
            )
    return ends


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that a certificate is for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names = found.get_values_for_type(x509.DNSName)
    return (*names, *(str(a) for a in found.get_values_for_type(x509.IPAddress)))


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key.

    Raises:
        ValueError: the file is no OpenSSH public key on a NIST curve.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except Exception as why:  # of several kinds, by what is wrong with the file
        raise ValueError(f"{path} is no OpenSSH public key: {why}") from why
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(
            f"{path} must be a key on a NIST elliptic curve (ecdsa-sha2-nistp384), got "
            f"{type(key).__name__}: `fedmoe keys --client N` makes one"
        )
    return key


def check_private_key(path: Path) -> None:
    """Raises ValueError or FileNotFoundError: it is not what a SuperNode can prove itself by."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: make it where keys are made, with `fedmoe keys`, and bring it here"
        )
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except Exception as why:  # of several kinds, by what is wrong with the file
        raise ValueError(
            f"{path} is no OpenSSH private key without a password: {why}"
        ) from why
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(
            f"{path} must be a key on a NIST elliptic curve, got {type(key).__name__}"
        )


def _wanted(first: Path, second: Path, kept: list[Path], force: bool) -> bool:
    """Whether a pair of files is to be made; notes it as kept where not."""
    there = [p for p in (first, second) if p.exists()]
    if force or not there:
        return True
    if len(there) == 1:
        missing = second if there == [first] else first
        raise ValueError(
            f"{there[0]} is there, but {missing} that belongs to it is not: bring it back, or "
            f"remove the former"
        )
    kept += there
    return False


def _make_authority(keys: Keys, days: int) -> None:
    key = ec.generate_private_key(CURVE())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmoe authority")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(days)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(key, hashes.SHA384())
    )
    _write(keys.ca_key, _pem(key), PRIVATE)
    _write(keys.ca, certificate.public_bytes(serialization.Encoding.PEM), PUBLIC)


def _make_server(keys: Keys, hosts: Sequence[str], days: int) -> None:
    authority = _certificate(keys.ca)
    if not keys.ca_key.is_file():
        raise ValueError(
            f"{keys.ca_key} is needed to sign {keys.server.name} and is not there: bring it back, "
            f"or let --force make a new authority, which every client must then be given"
        )
    signer = serialization.load_pem_private_key(keys.ca_key.read_bytes(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{keys.ca_key} must be an elliptic curve key, as `fedmoe keys` makes")
    if authority.not_valid_after_utc <= _now():
        raise ValueError(
            f"{keys.ca} has run out on {authority.not_valid_after_utc:%Y-%m-%d}: "
            f"--force makes a new authority, which every client must then be given"
        )
    key = ec.generate_private_key(CURVE())
    above = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(days)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name(h) for h in hosts]), critical=False)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), critical=False
        )
        .sign(signer, hashes.SHA384())
    )
    _write(keys.server_key, _pem(key), PRIVATE)
    _write(keys.server, certificate.public_bytes(serialization.Encoding.PEM), PUBLIC)


def _make_client(private: Path, public: Path) -> None:
    key = ec.generate_private_key(CURVE())
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(private, content, PRIVATE)
    _write(public, line + f" {private.name}\n".encode(), PUBLIC)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not host.isascii() or not host or any(c.isspace() or c in "/:@" for c in host):
            raise ValueError(
                f"a host must be a name or an address without a port, got {host!r}"
            ) from None
        return x509.DNSName(host)


def _builder(days: int) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as why:
        raise ValueError(f"{path} is no certificate in PEM: {why}") from why


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others in between."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
    beside.replace(path)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
