"""Names and addresses of hosts, in one spelling."""

from __future__ import annotations

import ipaddress
import re

_NAME = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_HOST = re.compile(rf"(?P<name>{_NAME}(\.{_NAME})*\.?|\[[0-9a-f:.]+\])(?P<port>:[0-9]{{0,5}})?", re.ASCII)


def host_name(text: str) -> str | None:
    """The name or address in ``NAME``, ``NAME:PORT`` or ``[ADDRESS]:PORT``, in one spelling; None when it is none."""
    found = _HOST.fullmatch(text.strip().lower())
    if found is None:
        return None
    name = found["name"].rstrip(".")
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return None if name.startswith("[") else name


def parse_names(text: str) -> tuple[str, ...]:
    """Names and addresses separated by commas, in one spelling. Raises ValueError naming the one that is none."""
    names = []
    for each in text.split(","):
        given = each.strip().lower()
        given = f"[{given}]" if given.count(":") > 1 and not given.startswith("[") else given
        found, name = _HOST.fullmatch(given), host_name(given)
        if found is None or name is None or found["port"]:
            raise ValueError(f"must be names or addresses, separated by commas and without ports; not so: {each!r}")
        names.append(name)
    return tuple(names)


def is_loopback(name: str) -> bool:
    """Whether it stands for this machine wherever it is looked up."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def is_wildcard(host: str) -> bool:
    """Whether to listen there is to listen on all addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError("must be a host and a port, as 10.0.0.1:6379")
    if not 0 < int(port) < 65536:
        raise ValueError("must have a port in 1..65535")
    return host, int(port)
