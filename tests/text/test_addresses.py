"""Host names and addresses in requests and options."""

from __future__ import annotations

import pytest

from lowmem.text.addresses import host_name, is_loopback, same_address


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:80", "localhost"),
        ("localhost:", "localhost"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("a:b", None),
        ("a:1:2", None),
        ("::1", None),
        ("", None),
        (":80", None),
    ],
)
def test_host_name_parsing(given: str, name: str | None) -> None:
    assert host_name(given) == name


def test_bind_addresses() -> None:
    assert same_address("192.168.1.5", ("192.168.1.5", 80))
    assert same_address("192.168.1.5", ("::ffff:192.168.1.5", 80))
    assert not same_address("192.168.1.6", ("192.168.1.5", 80))
    assert not same_address("evil.example", ("192.168.1.5", 80)) and not same_address("::1", None)
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org")))
