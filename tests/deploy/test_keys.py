"""Certificates and keys: formats, names, modes, and that nothing is lost by a second call."""

from __future__ import annotations

import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedmoe.deploy.keys import (
    AUTHORITY_DAYS,
    Keys,
    check_private_key,
    check_server,
    load_public_key,
    make_keys,
    names_of,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Keys:
    folder = tmp_path_factory.mktemp("made") / "keys"
    make_keys(folder, ["10.0.0.1", "moe.example"], range(2))
    return Keys(folder)


def test_private_files_are_for_their_owner_alone(keys):
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700
    for path in keys.folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        private = path.is_file() and path.suffix not in (".crt", ".pub")
        assert mode == (0o700 if path.is_dir() else 0o600 if private else 0o644), path


def test_a_client_s_pair_is_openssh_on_a_nist_curve(keys):
    private = keys.client(1)
    check_private_key(private)
    key = serialization.load_ssh_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert key.public_key() == load_public_key(private.with_suffix(".pub"))
    assert keys.public_keys() == {i: keys.client(i).with_suffix(".pub") for i in (0, 1)}


def test_the_server_s_certificate_is_for_all_its_names_and_signed_by_the_authority(keys):
    certificate = x509.load_pem_x509_certificate(keys.server.read_bytes())
    wanted = {"10.0.0.1", "moe.example", "localhost", "127.0.0.1", "::1"}
    assert set(names_of(certificate)) == wanted
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(keys.ca.read_bytes()))
    check_server(keys, wanted)


def test_the_authority_outlives_the_server_s_certificate(keys):
    server, authority = (
        x509.load_pem_x509_certificate(p.read_bytes()) for p in (keys.server, keys.ca)
    )
    assert (authority.not_valid_after_utc - server.not_valid_after_utc).days == (
        AUTHORITY_DAYS - 365
    )


def test_openssl_takes_certificate_and_key(keys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.server, keys.server_key)
    ssl.create_default_context(cafile=str(keys.ca))


def test_a_second_call_adds_what_is_missing_and_touches_nothing_else(tmp_path):
    folder = tmp_path / "keys"
    first = make_keys(folder, ["a.example"], [0])
    before = {p: p.read_bytes() for p in first.written}
    second = make_keys(folder, ["a.example"], [0, 2])
    assert second.written == (Keys(folder).client(2), Keys(folder).client(2).with_suffix(".pub"))
    assert set(second.kept) == set(before)
    assert {p: p.read_bytes() for p in before} == before


def test_force_makes_all_of_it_anew(tmp_path):
    before = {p: p.read_bytes() for p in make_keys(tmp_path, ["a.example"], [0]).written}
    made = make_keys(tmp_path, ["a.example"], [0], force=True)
    assert set(made.written) == set(before) and not made.kept
    assert all(p.read_bytes() != content for p, content in before.items())


def test_the_authority_s_key_may_be_kept_elsewhere_once_all_is_signed(tmp_path):
    keys = Keys(tmp_path)
    make_keys(tmp_path, ["a.example"])
    keys.ca_key.unlink()
    assert keys.server in make_keys(tmp_path, ["a.example"], [0]).kept
    for path in (keys.server, keys.server_key):
        path.unlink()
    with pytest.raises(ValueError, match=r"ca\.key is needed to sign .* bring it back"):
        make_keys(tmp_path, ["b.example"])


def test_a_client_s_machine_makes_its_own_key_alone(tmp_path):
    make_keys(tmp_path, clients=[7])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["client-7", "client-7.pub", "clients"]


@pytest.mark.parametrize(
    "hosts, clients, days, words",
    [
        ([], [], 365, "name what to make"),
        (["a.example"], [], 0, "days must be at least 1, got 0"),
        ([], [-1], 365, "numbers from 0, got -1"),
        (["a.example:8000"], [], 365, "without a port, got 'a.example:8000'"),
        (["a b"], [], 365, "without a port, got 'a b'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is(tmp_path, hosts, clients, days, words):
    with pytest.raises(ValueError, match=words):
        make_keys(tmp_path / "keys", hosts, clients, days=days)
    assert not (tmp_path / "keys").exists()


def test_a_certificate_for_other_names_is_told_with_how_to_mend_it(keys):
    with pytest.raises(ValueError, match=r"is for .*moe\.example.*, not for b\.example: remove it"):
        make_keys(keys.folder, ["b.example"])


def test_half_a_pair_is_not_made_whole_with_another_key(tmp_path):
    make_keys(tmp_path, clients=[0])
    Keys(tmp_path).client(0).unlink()
    with pytest.raises(ValueError, match=r"client-0\.pub is there, but .*client-0 .* is not"):
        make_keys(tmp_path, clients=[0])


def test_a_server_s_certificate_of_another_authority_is_refused(keys, tmp_path):
    make_keys(tmp_path, ["a.example"])
    Keys(tmp_path).ca.write_bytes(keys.ca.read_bytes())
    with pytest.raises(ValueError, match="was not signed by"):
        check_server(Keys(tmp_path))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ca\.crt is missing: `fedmoe keys"):
        check_server(Keys(tmp_path))
    with pytest.raises(FileNotFoundError, match="client-0 is missing"):
        check_private_key(Keys(tmp_path).client(0))


def test_keys_of_other_kinds_are_refused(tmp_path):
    other = ed25519.Ed25519PrivateKey.generate()
    public = other.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    private = other.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    (tmp_path / "a.pub").write_bytes(public)
    (tmp_path / "a").write_bytes(private)
    (tmp_path / "b").write_text("no key")
    with pytest.raises(ValueError, match="NIST elliptic curve"):
        load_public_key(tmp_path / "a.pub")
    with pytest.raises(ValueError, match="NIST elliptic curve"):
        check_private_key(tmp_path / "a")
    with pytest.raises(ValueError, match="no OpenSSH private key"):
        check_private_key(tmp_path / "b")
    with pytest.raises(ValueError, match="no OpenSSH public key"):
        load_public_key(tmp_path / "b")


@pytest.mark.parametrize("name", ["client-x.pub", "7.pub", "client-07.pub", "client-.pub"])
def test_a_public_key_that_does_not_say_whose_it_is_is_refused(tmp_path, name):
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / name).write_text("")
    with pytest.raises(ValueError, match=r"must be called client-NUMBER\.pub"):
        Keys(tmp_path).public_keys()
