"""From a registry entry to a folder on this machine. Nothing here ever downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from generation.weights.registry import Entry, WeightsError, lookup

if TYPE_CHECKING:
    from generation.settings import Models


def local_folder(entry: Entry) -> Path:
    """The folder that holds all of an entry's files. Raises WeightsError saying what is missing and how to get it."""
    if entry.repo is None:
        assert entry.folder is not None
        return entry.folder
    try:
        folder = Path(snapshot_download(entry.repo, revision=entry.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise WeightsError(f"{entry.name} is not on this machine; get it: {download_command(entry)}") from error
    absent = list(_absent_files(folder, entry.files))
    if absent:
        raise WeightsError(f"{entry.name} lacks {', '.join(absent)}; get it: {download_command(entry)}")
    return folder


def download_command(entry: Entry) -> str:
    """What to type to fetch an entry's files into the local cache."""
    include = " ".join(f"--include '{pattern}'" for pattern in entry.files)
    accept = " (accept its licence on the hub first)" if entry.gated else ""
    return f"hf download {entry.repo} --revision {entry.revision} {include}{accept}"


def missing(models: Models) -> list[str]:
    """One sentence for each checkpoint of a models file that is not here; empty when all are."""
    sentences = []
    for choice in models.stages.values():
        try:
            local_folder(lookup(choice))
        except WeightsError as error:
            sentences.append(str(error))
    return sentences


def _absent_files(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """Patterns that match no file, and shards that an index names but the folder lacks."""
    for pattern in patterns:
        found = [path for path in folder.glob(pattern) if path.is_file()]
        if not found:
            yield pattern
        for index in (path for path in found if path.name.endswith(".safetensors.index.json")):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = sorted(index.parent / shard for shard in shards)
            yield from (str(path.relative_to(folder)) for path in paths if not path.is_file())
