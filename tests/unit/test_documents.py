"""Commands, settings, tables and log lines in the documents are those of the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.settings import settings_of
from generation.arguments import TABLES as SERVICE_TABLES
from generation.splats.rasterize import gsplat_build
from neurons.miner.options import TABLES as MINER_TABLES
from scripts.ops import cluster, deploy
from scripts.ops.processes import STOP_S
from scripts.tools import api_reference, weights_reference

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + [
    path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "ARCHITECTURE.md"
]
GUIDE = (ROOT / "docs/DEPLOYMENT_GUIDE.md").read_text()
CONFIG = (ROOT / "docs/PRODUCTION_CONFIG.md").read_text()
# Other people's programs.
OTHERS = {
    *("apt", "btcli", "cd", "cp", "curl", "docker", "export", "git", "iptables", "journalctl", "kubectl", "mv", "pip"),
    *("pipx", "pm2", "prometheus"),
    *("rm", "ssh", "sudo", "systemctl", "tail", "timedatectl", "useradd"),
}
# In lines of the log, what stands there in place of a value.
VALUES = r"…|\[X\]|\d+\.\d+|\b10006\b|score(?= …)|Address already in use|(?<=subnet )17|Wallet"
FLAGS = {flag for each in settings_of({**SERVICE_TABLES, **MINER_TABLES, **cluster.TABLES}) for flag in each.flags}
SHARED_FLAGS = {"--config-file", "--save", "--version", "--help"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a bash block, and of each one of ours between backticks."""
    lines = [
        line
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    lines += re.findall(r"`((?:\.venv/bin/python -m|\./\w+\.(?:sh|py)|scripts/\w+\.sh)[^`]*)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["sudo"]:
            words = words[3:] if words[1] == "-u" else words[1:]
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []


COMMANDS = [
    pytest.param(command, id=f"{path.name}: {' '.join(command)[:90]}")
    for path in DOCUMENTS
    for command in commands(path.read_text())
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
        command = command[1:]
    name, *words = command
    if name == ".venv/bin/python":
        assert words[0] == "-m"
        check_module(words[1], words[2:])
    elif name == "./deploy_competitive.sh":
        monkeypatch.setattr(deploy, "ROOT", tmp_path)  # no file of settings
        given = [word for word in words if word != "FLAGS"]
        deploy.parse([str(tmp_path / "models.yaml") if word == "COPY" else word.replace("UID", "7") for word in given
                      if make(tmp_path / "models.yaml")], tmp_path)  # fmt: skip
    elif "/" in name and not name.startswith("/"):
        assert name.startswith(".venv/bin/") or (ROOT / name).stat().st_mode & 0o100, name
    else:
        assert name in OTHERS, name
    if name == "curl":
        (url,) = (word for word in words if word.startswith("http"))
        path = "/" + url.split("/", 3)[3]
        assert f"`{path}`" in (ROOT / "docs/API.md").read_text()


def make(path: Path) -> bool:
    path.touch()
    return True


def check_module(module: str, words: list[str]) -> None:
    """It is there, and takes these flags."""
    if module in ("pytest", "pip"):
        return
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text()
    if module in ("generation.serve_competitive", "neurons.serve_miner_competitive"):
        known = FLAGS | SHARED_FLAGS
    else:
        folder = path.parent if path.name == "__main__.py" else path
        known = set(
            re.findall(
                r"--[\w.-]+", "".join(each.read_text() for each in folder.glob("*.py")) if folder.is_dir() else source
            )
        )
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def test_the_api_is_described_as_it_is() -> None:
    assert (ROOT / "docs/API.md").read_text() == api_reference.document(), "run: python -m scripts.tools.api_reference"


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", CONFIG, re.DOTALL))
def test_worked_examples_are_whole(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "competitive.toml").write_text(example)
    monkeypatch.setattr(deploy, "ROOT", tmp_path)
    deployment = deploy.Deployment(deploy.parse([], tmp_path))
    assert deployment.network == "finney"
    assert deployment.profile == "full"


def test_the_table_of_memory_classes() -> None:
    for each in yaml.safe_load((ROOT / "configs/models_full.yaml").read_text())["memory_classes"]:
        row = next(line for line in GUIDE.splitlines() if f"| `{each['name']}` |" in line)
        assert row.startswith(f"| from {each['least_gib']} GiB ")
        assert row.endswith(f"| {each['max_batch']} |")
        forms = {"none": "bfloat16", "nf4": "4 bits (NF4)"}
        transformer, t5 = each["quantization"], each.get("quantization_t5", each["quantization"])
        assert f"| {forms[transformer]}{'' if t5 == transformer else f'; T5 {forms[t5]}'} |" in row


def test_the_table_of_weights() -> None:
    assert weights_reference.with_table(GUIDE) == GUIDE, "run: python -m scripts.tools.weights_reference"
    assert "| `rmbg-2.0` | briaai/RMBG-2.0 (gated) | 0.9 | `background` | yes | CC BY-NC 4.0" in GUIDE


def test_lines_of_the_logs_are_said_by_the_code() -> None:
    sources = [
        path for folder in ("common", "generation", "neurons", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    said = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in sources))  # strings over several lines
    section = GUIDE[GUIDE.index("## What the log says") :]
    missing = []
    for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        for line in re.findall(r"`([^`]+)`", row):
            if line in ("401", "out of memory") or line.startswith("profile tiny") or " " not in line:
                continue
            parts = [part.strip(" :,()") for part in re.split(VALUES, line)]
            missing += [f"{line}: {part}" for part in parts if len(part) > 8 and part not in said]
    assert not missing


def test_the_public_workflow_runs_what_ci_runs() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    (step,) = (step["run"] for step in steps if step.get("run", "").endswith("bash .ci/run"))
    assert step.startswith("sudo ")  # the cluster's tests make network namespaces
    assert "exec scripts/test.sh" in (ROOT / ".ci/run").read_text()


def test_stops_are_as_long_everywhere() -> None:
    """systemd, Docker and pm2 wait for as long as stop_competitive.sh."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    names = {"generation": "generation_service", "miner": "miner", "rehearsal": "rehearsal"}
    for service, name in names.items():
        assert services[service]["stop_grace_period"] == f"{STOP_S[name]:.0f}s"
        assert f'app("{name}", {STOP_S[name]:.0f}' in (ROOT / "ecosystem.config.js").read_text()


def test_no_container_that_may_crash_holds_the_network_of_others() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    holder = services.pop("network")
    assert "build" not in holder
    assert {each["network_mode"] for each in services.values()} == {"service:network"}
    assert not any("ports" in each for each in services.values())  # Docker refuses them beside that


def test_no_volume_outlives_what_an_image_brings() -> None:
    """A named volume is filled from the first image alone, and hides the same folder of all later ones."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    made = {folder for line in re.findall(r"mkdir -p (.+?)(?: &&|\n)", dockerfile) for folder in line.split()}
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name in ("generation", "miner", "rehearsal"):
        for volume in services[name]["volumes"]:
            target = volume.removesuffix(":ro").rpartition(":")[2]
            if target == "/wallets":
                continue
            assert target.removeprefix("/app/") in made, target  # by the user who writes there, and empty
            assert target not in ("/app/.cache", "/app/.cache/gsplat")
    assert "/app/.cache/compiled" in str(services["generation"]["volumes"])
    assert gsplat_build.CACHE == ROOT / ".cache/gsplat"
