from __future__ import annotations

import pytest

from fedmoe.deploy.address import Address


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("10.0.0.1:8000", "10.0.0.1", 8000),
        ("moe.example:1", "moe.example", 1),
        ("[::1]:65535", "::1", 65535),
    ],
)
def test_an_address_is_read_and_written_alike(text, host, port):
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "host", ":8000", "host:", "host:0", "host:65536", "host:x", "::1:8000", "[a]:1:2"]
)
def test_what_is_no_address_is_refused_with_what_was_typed(text):
    with pytest.raises(ValueError, match="HOST:PORT|a port must be from 1 to 65535"):
        Address.parse(text)


@pytest.mark.parametrize("scheme", ["http://a:1", "https://a.example:8000"])
def test_an_address_is_no_url(scheme):
    with pytest.raises(ValueError, match="HOST:PORT"):
        Address.parse(scheme)


@pytest.mark.parametrize(
    "host, loopback, near",
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("localhost", True, "localhost"),
        ("::1", True, "::1"),
        ("0.0.0.0", False, "127.0.0.1"),
        ("::", False, "::1"),
        ("10.0.0.1", False, "10.0.0.1"),
        ("moe.example", False, "moe.example"),
    ],
)
def test_who_can_reach_an_address_and_how_this_machine_does(host, loopback, near):
    address = Address(host, 8000)
    assert address.is_loopback is loopback
    assert address.near == Address(near, 8000)
