"""A turntable of a splat: rendered by an engine, encoded here."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet


async def film(engine: Engine | Fleet, ply_data: bytes, device: str, background: bool = False) -> bytes:
    """The mp4 of a PLY, which turns once. Raises as ``Engine.call`` does."""
    rendered = await engine.call(partial(frames, data=ply_data, device=device), background)
    return await asyncio.to_thread(_encode, rendered)


def frames(pipeline: Any, data: bytes, device: str) -> Any:
    """The frames. Runs beside the pipeline, perhaps in another process: its arguments must be picklable."""
    from generation.splats import ply
    from generation.web import turntable

    return turntable.render(ply.read(data).to(device))


def _encode(frames: Any) -> bytes:
    from generation.web import turntable  # brings torch, which takes seconds to import

    return turntable.encode(frames)
