"""HOST:PORT as it is typed."""

import ipaddress
from dataclasses import dataclass

MOST_PORT = 65535


@dataclass(frozen=True)
class Address:
    """Where a server is, or is to be."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> "Address":
        """Raises ValueError: it is not HOST:PORT, or [HOST]:PORT for an IPv6 address."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not bare or (":" in bare) == (bare == host) or set(bare) & set("[]/@ "):
            raise ValueError(
                f"a server must be named as HOST:PORT, or [HOST]:PORT if its address has colons, "
                f"got {text!r}"
            )
        if not port.isdecimal() or not 1 <= int(port) <= MOST_PORT:
            raise ValueError(f"a port must be from 1 to {MOST_PORT}, got {port!r} in {text!r}")
        return Address(bare, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_anywhere(self) -> bool:
        """Whether it stands for all addresses of this machine."""
        return self.host in ("0.0.0.0", "::")

    @property
    def near(self) -> "Address":
        """How this machine itself reaches a server that listens here."""
        if not self.is_anywhere:
            return self
        return Address("::1" if self.host == "::" else "127.0.0.1", self.port)
