"""From a registry entry to its folder on this machine. Never downloads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from generation.weights.lock import read_lock, url_folder
from generation.weights.registry import REGISTRY, Entry, MissingWeights, WeightsError, lookup, wanted

if TYPE_CHECKING:
    from generation.schema.options import ModelChoice

#: the longest header that safetensors itself reads, in bytes
_LONGEST_HEADER = 100_000_000


def local_folder(entry: Entry) -> Path:
    """The folder with all files of an entry, complete. Raises WeightsError with the reason and what to do.

    It raises MissingWeights when a file is absent. For a repository the folder is that of the commit that the download
    recorded, even if the branch has moved since.
    """
    if entry.url is not None:
        return _url_folder(entry)
    if entry.repo is None:
        assert entry.folder is not None
        _check(entry, entry.folder)
        return entry.folder
    lock = read_lock(entry)
    revision = lock.commit if lock else entry.revision
    try:
        folder = Path(snapshot_download(entry.repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MissingWeights(f"{entry.name} is not on this machine; {remedy(entry)}") from error
    for name, file in lock.files.items() if lock else ():
        path = folder / name
        with _reading(entry, name):
            has = path.stat().st_size if path.is_file() else file.size
        if has != file.size:
            raise WeightsError(f"{entry.name}: {name} has {has} bytes, its download had {file.size}; {remedy(entry)}")
    _check(entry, folder)
    return folder


def only_file(entry: Entry) -> str:
    """The name of the only file of an entry. Raises WeightsError for a folder whose card does not name it."""
    if entry.url is not None:
        return entry.url.rpartition("/")[2]
    if len(entry.files) != 1:
        raise WeightsError(f"{entry.name} must be one file: its card should say of which model, as 'of'")
    return entry.files[0]


def _url_folder(entry: Entry) -> Path:
    folder, name = url_folder(entry), only_file(entry)
    with _reading(entry, name):
        if not (folder / name).exists():
            raise MissingWeights(f"{entry.name} is not on this machine; {remedy(entry)}")
        has = (folder / name).stat().st_size
    if has != entry.size:
        raise WeightsError(f"{entry.name}: {name} has {has} bytes, it should have {entry.size}; {remedy(entry)}")
    return folder


def remedy(entry: Entry) -> str:
    """What to do when files of an entry are absent or damaged."""
    return f"get it: {download_command(entry)}" if entry.is_downloaded else "copy its folder again"


def download_command(entry: Entry) -> str:
    """The command that downloads an entry's files."""
    other = "" if entry.revision == REGISTRY[entry.name].revision else f" --revision {entry.revision}"
    accept = " (accept its licence on the hub first)" if entry.gated else ""
    return f".venv/bin/python -m scripts.ops.download_weights --only {entry.name}{other}{accept}"


def missing(choices: Iterable[ModelChoice]) -> list[str]:
    """One sentence for each chosen checkpoint that is missing or damaged."""
    sentences = []
    for choice in choices:
        try:
            local_folder(lookup(choice))
        except WeightsError as error:
            sentences.append(str(error))
    return sentences


def _check(entry: Entry, folder: Path) -> None:
    """Raises WeightsError when a file is absent or a safetensors file ends too early.

    Only of files that are used: a download brings and repairs no others.
    """
    absent = list(_absent_files(entry, folder))
    if absent:
        raise MissingWeights(f"{entry.name} lacks {', '.join(absent)}; {remedy(entry)}")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    for name in wanted(names, entry.files) if entry.files else names:
        with _reading(entry, name):
            reason = _damage(folder / name)
        if reason:
            raise WeightsError(f"{entry.name}: {name} {reason}; {remedy(entry)}")


@contextmanager
def _reading(entry: Entry, name: str) -> Iterator[None]:
    """Raise errors while a file is inspected as WeightsError."""
    try:
        yield
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{entry.name}: {name} can not be read ({error!r}); {remedy(entry)}") from error


def _absent_files(entry: Entry, folder: Path) -> Iterator[str]:
    """Patterns that match no file, weights that a config lacks, and shards that an index names but the folder lacks."""
    for pattern in entry.files:
        with _reading(entry, pattern):
            found = [path for path in folder.glob(pattern) if path.is_file()]
        names = {path.name for path in found}
        if not found:
            yield pattern
        elif pattern.endswith("/*") and names == {"config.json"}:
            yield pattern.replace("*", "*.safetensors")
        for index in (path for path in found if path.name.endswith(".safetensors.index.json")):
            with _reading(entry, str(index.relative_to(folder))):
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                paths = sorted(index.parent / shard for shard in shards)
                lost = [str(path.relative_to(folder)) for path in paths if not path.is_file()]
            yield from lost


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header (eight bytes of length, then JSON); None if nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            return "is cut short or no safetensors file"
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is no safetensors file"
    return None if size == 8 + length + end else f"has {size} bytes, by its header it should have {8 + length + end}"
