"""systemd units: ``deploy_competitive.sh --install-service`` writes them, ``--uninstall-service`` takes them away.

They run under the user whom the folder belongs to, with the settings of competitive.toml. Standard library only.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from scripts.ops.processes import ROOT, STOP_S, Refused

UNITS = Path("/etc/systemd/system")
TARGET = "competitive.target"
ABOUT = {
    "ray": "Ray",
    "generation_service": "generation service",
    "rehearsal": "rehearsal network",
    "miner": "miner",
}
WITHOUT_SYSTEMD = """there is no systemd here (a container, most likely). What starts the miner after a restart there:
  - the container's own start command: {root}/deploy_competitive.sh, and then: sleep infinity
  - cron, where it runs: @reboot {root}/deploy_competitive.sh
  - pm2: pm2 start {root}/ecosystem.config.js && pm2 save
Save the flags first, so that the command needs none: ./deploy_competitive.sh FLAGS --save"""


def unit(name: str) -> str:
    return f"competitive-{name.replace('_service', '')}.service"


def render(names: Sequence[str], root: Path, user: str) -> dict[str, str]:
    """File name -> content."""
    if any(character in str(root) for character in '"\\%$\n'):
        raise Refused(f"{root}: systemd takes no such folder name; move the folder")
    services = [unit(name) for name in names]
    files = {
        TARGET: f"""# Written by deploy_competitive.sh --install-service
[Unit]
Description=Competitive miner in {root}
Wants={" ".join(services)}

[Install]
WantedBy=multi-user.target
"""
    }
    for name in names:
        others = [unit(each) for each in names if each != name]
        before = {"miner": others, "generation_service": [unit("ray")] if "ray" in names else []}.get(name, [])
        # The service finds Ray by sockets in /tmp.
        shared = f"\nJoinsNamespaceOf={unit('ray')}" if name == "generation_service" and "ray" in names else ""
        files[unit(name)] = f"""# Written by deploy_competitive.sh --install-service
[Unit]
Description=Competitive miner: {ABOUT[name]}
PartOf={TARGET}
Wants=network-online.target
After={" ".join(["network-online.target", *before])}
StartLimitIntervalSec=0{shared}

[Service]
User={user}
WorkingDirectory={root}
ExecStart="{root}/.venv/bin/python" "{root}/scripts/ops/serve.py" {name}
Restart=on-failure
RestartSec=5
# What is in flight is finished or spooled.
KillMode=mixed
TimeoutStopSec={STOP_S[name]:.0f}
LimitNOFILE=65536
TasksMax=8192
OOMPolicy=stop
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full
ProtectKernelTunables=yes
ProtectControlGroups=yes
StandardOutput=journal
StandardError=journal
SyslogIdentifier={unit(name).removesuffix(".service")}

[Install]
WantedBy={TARGET}
"""
    return files


def check_can_install() -> pwd.struct_passwd:
    """The user to run as. Raises Refused for what is missing."""
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        raise Refused(WITHOUT_SYSTEMD.format(root=ROOT))
    if os.geteuid() != 0:
        raise Refused("units are root's to write: sudo ./deploy_competitive.sh --install-service")
    owner = ROOT.stat().st_uid
    if owner == 0:
        raise Refused(
            f"{ROOT} belongs to root, and the miner needs no root. Give it a user: useradd --create-home miner, "
            f"then move the folder and chown --recursive miner it (docs/DEPLOYMENT_GUIDE.md)"
        )
    try:
        return pwd.getpwuid(owner)
    except KeyError as error:
        raise Refused(f"{ROOT} belongs to user {owner}, who has no name here") from error


def install(names: Sequence[str], user: str, units: Path = UNITS) -> list[str]:
    """Write and start them; what was done. Raises Refused or OSError."""
    if other := _installed_from(units):
        raise Refused(f"{units / TARGET} is of {other}: --uninstall-service there first")
    files = render(names, ROOT, user)
    _systemctl("stop", TARGET, may_fail=True)
    for name, content in files.items():
        (units / name).write_text(content)
    for stale in set(map(unit, ABOUT)) - files.keys():
        (units / stale).unlink(missing_ok=True)
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", *files)
    return [f"wrote {units / name}" for name in files]


def uninstall(units: Path = UNITS) -> list[str]:
    """Stop and remove them; what was done. Raises Refused or OSError."""
    if other := _installed_from(units):
        raise Refused(f"{units / TARGET} is of {other}: --uninstall-service there")
    found = [name for name in (TARGET, *map(unit, ABOUT)) if (units / name).exists()]
    if found:
        _systemctl("disable", "--now", *found, may_fail=True)
        for name in found:
            (units / name).unlink()
        _systemctl("daemon-reload")
    return [f"removed {units / name}" for name in found] or ["no service was installed"]


def _installed_from(units: Path) -> str | None:
    """The folder whose units are installed, where that is another one that is there."""
    try:
        found = re.search(r"^Description=Competitive miner in (.+)$", (units / TARGET).read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    return found[1] if found and found[1] != str(ROOT) and Path(found[1]).is_dir() else None


def _systemctl(*arguments: str, may_fail: bool = False) -> None:
    ended = subprocess.run(["systemctl", *arguments], capture_output=True, text=True)
    if ended.returncode != 0 and not may_fail:
        raise Refused(f"systemctl {' '.join(arguments)}: {ended.stderr.strip()}")
