"""The lock of a download: its commit and every file's size and hash, in the hub's cache beside the files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from generation.weights.registry import Entry, WeightsError


@dataclass(frozen=True)
class LockedFile:
    """One file of a download."""

    size: int  # bytes
    digest: str  # SHA-256 of a large file; of a small one, git's hash of it (SHA-1)


@dataclass(frozen=True)
class Lock:
    """A download: its commit and its files."""

    commit: str
    files: dict[str, LockedFile]  # by path in the repository


def url_folder(entry: Entry) -> Path:
    """Where the file of an entry that is no repository is kept, beside the hub's, whether it is there or not."""
    return Path(constants.HF_HUB_CACHE) / f"url--{entry.name}"


def cache_folder(entry: Entry) -> Path:
    """Where the hub's cache keeps an entry's repository, whether it is there or not."""
    if entry.url is not None:
        return url_folder(entry)
    assert entry.repo is not None
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=entry.repo, repo_type="model")


def lock_path(entry: Entry) -> Path:
    """Where the lock of an entry at its revision is kept."""
    return cache_folder(entry) / f"lock-{entry.revision.replace('/', '--')}.json"


def read_lock(entry: Entry) -> Lock | None:
    """The lock of an entry at its revision, None without one. Raises WeightsError for a file that is not a lock."""
    path = lock_path(entry)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): LockedFile(int(f["size"]), str(f["digest"])) for name, f in content["files"].items()}
        return Lock(str(content["commit"]), files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise WeightsError(f"{path}: is not a download's lock ({error!r}); delete it") from error


def write_lock(entry: Entry, lock: Lock) -> Path:
    """Write a lock atomically. Returns its path. Raises OSError."""
    path = lock_path(entry)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(asdict(lock), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(half, path)
    return path
