"""The service's own settings, as flags, variables and ``competitive.toml`` give them.

Standard library alone: ``deploy_competitive.sh`` reads them before anything is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.checks import Choice, FilePath, Whole, Words
from common.settings import CommandLine, Score, setting, settings_of
from generation.schema.hosts import parse_address, parse_names
from generation.schema.limits import MAX_GAUSSIANS, MIN_GAUSSIANS

ROOT = Path(__file__).resolve().parents[1]

_GPUS = "all, or numbers of GPUs as 0,1"
_HTTP = "http, a host and a port, as http://127.0.0.1:10007"
_HOSTS = "names or addresses, separated by commas and without ports"


def _is_gpus(text: str) -> None:
    if not re.fullmatch(r"all|[0-9]{1,3}(,[0-9]{1,3})*", text):
        raise ValueError(f"must be {_GPUS}")


def _is_http(text: str) -> None:
    parts = urlsplit(text)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or not parts.port:
        raise ValueError(f"must be {_HTTP}")


def _is_there(text: str) -> None:
    if not text:
        raise ValueError("must not be empty")


@dataclass(frozen=True, kw_only=True)
class ServiceTable:
    """The table [service]. None means: the profile's own."""

    profile: str = setting(
        "auto",
        Choice("auto", "full", "tiny"),
        "which models: full needs a CUDA GPU and downloaded weights, tiny comes with the code",
    )
    config: Path | None = setting(
        None,
        FilePath(exists=True),
        "generator config for text prompts, a YAML file",
        default_is="the profile's",
        metavar="PATH",
    )
    image_config: Path | None = setting(
        None,
        FilePath(exists=True),
        "generator config for image prompts, a YAML file",
        default_is="the profile's",
        metavar="PATH",
    )
    models: Path | None = setting(
        None,
        FilePath(exists=True),
        "models file, a YAML file: which checkpoint each stage loads",
        default_is="the profile's",
        metavar="PATH",
    )
    host: str = setting("127.0.0.1", Words(_is_there), "address to listen on", metavar="ADDRESS")
    port: int = setting(10006, Whole(1, 65535), "port to listen on", metavar="N")
    allowed_hosts: str = setting(
        "",
        Words(lambda text: text and parse_names(text), _HOSTS),
        "further Host names that requests may use, beside loopback's and --host's",
        metavar="NAME,NAME",
    )
    flux_steps: int | None = setting(
        None, Whole(1, 50), "sampling steps of text to image", default_is="the profile's", metavar="N"
    )
    max_gaussians: int | None = setting(
        None,
        Whole(MIN_GAUSSIANS, MAX_GAUSSIANS, "validators reject fewer"),
        "most Gaussians in a splat, in place of the config's number",
        default_is="the config's",
        metavar="N",
    )
    memory_class: str | None = setting(
        None,
        Words(_is_there),
        "memory class of the models file, which decides precision and batch size",
        default_is="by the GPU's memory",
        metavar="NAME",
    )
    cluster: str = setting(
        "",
        Words(lambda text: text and parse_address(text), "a host and a port, as 10.0.0.1:6379"),
        "use all GPUs of the Ray cluster whose head is at this address",
        default_is="this machine's GPUs",
        metavar="HOST:PORT",
    )
    cluster_token_file: Path = setting(
        Path("~/.404gen/cluster_token"),
        FilePath(),
        "file with the cluster's token, mode 0600",
        metavar="PATH",
    )
    gpus: str = setting("all", Words(_is_gpus, _GPUS), "GPUs to use, as torch numbers them", metavar="all|N,N")
    max_queue: int = setting(
        16, Whole(1, 10_000), "most requests that may wait; more are answered with 503", metavar="N"
    )
    log_file: Path = setting(
        ROOT / "logs" / "generation_service.log",
        FilePath(),
        "log file, rotated",
        default_is="logs/generation_service.log",
        metavar="PATH",
    )
    gallery: Path = setting(
        ROOT / "data" / "studio",
        FilePath(),
        "folder of Studio's gallery",
        default_is="data/studio",
        metavar="PATH",
    )
    miner_url: str = setting(
        "http://127.0.0.1:10007",
        Words(_is_http, _HTTP),
        "address of the miner's metrics, for Studio's page Miner",
        metavar="URL",
    )
    profile_trace: Path | None = setting(
        None, FilePath(), "write a torch.profiler trace of the first request here (gzipped JSON)", metavar="PATH"
    )


@dataclass(frozen=True, kw_only=True)
class Arguments(ServiceTable, Score):
    """All that the service reads."""


TABLES = {"service": ServiceTable, "score": Score}
COMMAND_LINE = CommandLine("serve_competitive", "The generation service.", TABLES)


def checked(values: Mapping[str, Any]) -> Arguments:
    """Arguments from values by key, as text or typed; None counts as not given. Raises ValueError with all problems."""
    known = {each.key: each for each in settings_of(TABLES)}
    good, problems = {}, []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{key}: no such argument")
            continue
        value = str(value) if isinstance(value, Path) else value
        check = known[key].check
        try:
            if value is not None:
                good[key] = check.from_text(value) if isinstance(value, str) else check.from_toml(value)
        except ValueError as error:
            problems.append(f"{key}: {value!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return Arguments(**good)
