"""Several machines as one Ray cluster: ``deploy_competitive.sh --cluster-head`` and ``--join HEAD:6379``.

Whoever reaches Ray's ports and has the token runs code on every machine, and token and data travel in clear: so the
network that a cluster runs on is looked at before Ray is started. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import re
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.checks import Switch, Words
from common.settings import setting
from generation.fleet.ray_environment import ENGINE
from generation.schema.hosts import parse_address
from scripts.ops import probe
from scripts.ops.processes import Refused

HEAD_PORT = 6379
#: Ray's other ports, the same on each machine.
PORTS = {
    "--node-manager-port": 6380,
    "--object-manager-port": 6381,
    "--runtime-env-agent-port": 6382,
    "--min-worker-port": 6400,
    "--max-worker-port": 6499,
    # Of parts that are not started: not among the ports that Ray gives out by chance.
    "--metrics-export-port": 6383,
    "--dashboard-agent-grpc-port": 6384,
    "--dashboard-agent-listen-port": 6385,
}
#: For the pictures and splats that are on their way, in bytes; it lies in /dev/shm.
STORE = 512 << 20
SHM = Path("/dev/shm")
NET = Path("/sys/class/net")
REACH_S = 5.0
#: How long the network of a machine that has just started is waited for.
NETWORK_S, NETWORK_LOOK_S = 20.0, 0.5
START_S = 90.0
_PRIVATE = [ipaddress.ip_network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")]
_TLS = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, kw_only=True)
class ClusterTable:
    """The table [cluster]: what this machine is in one."""

    head: bool = setting(
        False, Switch(), "start a cluster: this machine runs its head, service and miner", flags=("--cluster-head",)
    )
    join: str = setting(
        "",
        Words(lambda text: text and parse_address(text), "a host and a port, as 10.0.0.1:6379"),
        "lend this machine's GPUs to the cluster with this head, and start nothing else",
        flags=("--join",),
        metavar="HOST:PORT",
    )


TABLES = {"cluster": ClusterTable}


def own_address(towards: str | None) -> str:
    """This machine's address on the way to ``towards``, or, without it, to anywhere. Raises Refused."""
    try:
        family, *_, address = socket.getaddrinfo(towards or "192.0.2.1", HEAD_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probing:
            probing.connect(address)  # sends nothing
            return str(probing.getsockname()[0])
    except (OSError, UnicodeError) as error:
        if towards is not None:
            raise Refused(f"there is no way to {towards} from here: {getattr(error, 'strerror', error)}") from error
    found = sorted(address for name, address in _interfaces().items() if name != "lo")
    if len(found) != 1:
        raise Refused(
            f"which of its addresses do the other machines reach this one by ({', '.join(found) or 'it has none'})? "
            f"Name it: --cluster ADDRESS:{HEAD_PORT}"
        )
    return found[0]


def check_network(own: str, other: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """What the network between the machines is, in words. Raises Refused for one where the token can be read."""
    interface = next((name for name, address in _interfaces().items() if address == own), "")
    where = f"{own}{interface and f' on {interface}'}"
    if _is_wireguard(interface):
        return f"{where}, WireGuard: encrypted"
    if environment.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        missing = [name for name in _TLS if not Path(environment.get(name) or "/nowhere").is_file()]
        if missing:
            raise Refused(f"RAY_USE_TLS is set, and {missing[0]} names no file")
        return f"{where}, with TLS: encrypted"
    ends = [own] if other is None else [own, other]
    for end in ends:
        if not _is_private(end):
            raise Refused(
                f"{end} is a public address, and the cluster's token would travel in clear. Connect the machines by "
                f"WireGuard or a private network, and use their addresses there (on the head: --cluster "
                f"ADDRESS:{HEAD_PORT}), or set RAY_USE_TLS=1 and {', '.join(_TLS)}"
            )
    if ipaddress.ip_address(own).is_loopback:
        return f"{where}: this machine alone"
    return f"{where}, a private range: token and data travel in clear, so it must be yours alone"


def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError, ValueError) as error:
        raise Refused(f"{host}: {getattr(error, 'strerror', None) or error}") from error
    return address.is_loopback or any(address in network for network in _PRIVATE if network.version == address.version)


def _is_wireguard(interface: str) -> bool:
    """In the kernel's words; Tailscale's is WireGuard in a program of its own."""
    try:
        kind = (NET / (interface or "-") / "uevent").read_text()
    except OSError:
        return False
    return "DEVTYPE=wireguard\n" in kind or interface.startswith("tailscale")


def _interfaces() -> dict[str, str]:
    """Name -> IPv4 address, the first where there are several."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def make_token(path: Path) -> bool:
    """A new one of mode 0600, unless there is one; whether there was none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    return True


def check_shared_memory() -> None:
    """Raises Refused."""
    try:
        total = shutil.disk_usage(SHM).total
    except OSError as error:
        raise Refused(f"{SHM}: {error.strerror}") from error
    if total < STORE:
        raise Refused(
            f"{SHM} has {total >> 20} MiB, and Ray needs {STORE >> 20} there for what is on its way. In a container: "
            "--shm-size=1g (Docker), a volume of medium Memory (Kubernetes)"
        )


def ray_arguments(head: tuple[str, int], own: str, is_head: bool, engines: int) -> list[str]:
    """For ``ray start``. ``engines``: those on the CPU that this machine offers beside its GPUs, which Ray finds."""
    place = [f"--port={head[1]}", "--include-dashboard=false", "--no-monitor"]
    return [
        *("start", "--block", "--disable-usage-stats", "--include-log-monitor=false"),
        *(["--head", *place] if is_head else [f"--address={head[0]}:{head[1]}"]),
        f"--node-ip-address={own}",
        f"--object-store-memory={STORE}",
        *(f"{flag}={number}" for flag, number in PORTS.items()),
        *([f'--resources={{"{ENGINE}": {engines}}}'] if engines else []),
    ]


def check_ports(head: tuple[str, int], is_head: bool) -> str | None:
    """None when Ray can listen where it has to, else why not."""
    ports = [*([head[1]] if is_head else []), *(PORTS[f"--{name}-port"] for name in ("node-manager", "object-manager"))]
    return next(filter(None, (probe.check_port("0.0.0.0", port) for port in ports)), None)


def check_reach(head: tuple[str, int]) -> None:
    """That somebody listens there. A machine that has just started may have no route yet. Raises Refused."""
    until = time.monotonic() + NETWORK_S
    while True:
        try:
            socket.create_connection(head, timeout=REACH_S).close()
            return
        except (OSError, UnicodeError) as error:
            has_no_route = isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
            if has_no_route and time.monotonic() < until:
                time.sleep(NETWORK_LOOK_S)
                continue
            reason = getattr(error, "strerror", None) or error
            raise Refused(
                f"no head at {head[0]} port {head[1]}: {reason}. Start it there first (--cluster-head), and let this "
                "machine through its firewall"
            ) from error


def wait_for_ray(out: Path, pid: int, token: Path) -> str | None:
    """None once Ray runs, or why it does not. ``out``: what it prints. Raises Refused where that is known."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        ended = not probe.alive(pid)
        text = out.read_text(errors="replace")
        if "Ray runtime started" in text:
            return None
        if ended and "InvalidAuthToken" in text:
            raise Refused(f"the head does not take this machine's token: copy the head's to {token}")
        if ended and (found := re.search(r"Version mismatch: (.+(?:\n .+)*)", text)):
            raise Refused(
                f"all machines need the same Ray and Python, to the last number: {' '.join(found[1].split())}"
            )
        if ended:
            return "Ray ended while it was starting"
        time.sleep(0.1)
    return f"Ray was not up within {START_S:.0f} s"
