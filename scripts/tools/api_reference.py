"""Writes docs/API.md from the service's OpenAPI description: ``.venv/bin/python -m scripts.tools.api_reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generation.serve_competitive import make_engine
from generation.settings import Settings
from generation.web.app import create_app

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/API.md"
HEAD = """# The generation service's HTTP API

Written by `.venv/bin/python -m scripts.tools.api_reference` from the service's OpenAPI description, which it serves at
`/openapi.json`, and as a page with forms at `/docs`. A text to a splat, a picture to a splat, and the score of a splat:

```bash
curl -s -F prompt='a red cube' -F seed=1 -o cube.ply -D - http://127.0.0.1:10006/generate/
curl -s -F prompt_image_file=@picture.png -o picture.ply http://127.0.0.1:10006/generate/
curl -s -F prompt='a red cube' -o cube.mp4 http://127.0.0.1:10006/generate_video/
curl -sN http://127.0.0.1:10006/events
curl -s http://127.0.0.1:10006/health
```

Splats are binary little endian PLY with the fields of 3D Gaussian Splatting. An answer of 200 with an empty body means
that the result was not worth submitting: the header `X-Rejected` says why.
"""
_LIMITS = ("enum", "format", "minimum", "maximum", "minLength", "maxLength", "default")


def render(openapi: dict[str, Any]) -> str:
    """The document, for a description as ``FastAPI.openapi()`` gives it."""
    parts = [HEAD, openapi["info"]["description"] + "\n"]
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} `{path}`\n")
            parts.append(" ".join(operation.get("description", "").split()) + "\n")
            parts += _operation(operation)
    return "\n".join(parts)


def _operation(operation: dict[str, Any]) -> Iterator[str]:
    if parameters := operation.get("parameters"):
        yield _table(("parameter", "in", "meaning"), ((f"`{p['name']}`", p["in"], _about(p)) for p in parameters))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        for form in [schema] if "properties" in schema else schema["oneOf"]:
            fields = ((f"`{name}`", _about({"schema": field})) for name, field in form["properties"].items())
            yield _table((f"field of `{kind}`", "meaning"), fields)
    yield _table(("answer", "meaning"), ((status, _answer(each)) for status, each in operation["responses"].items()))


def _about(parameter: dict[str, Any]) -> str:
    schema = parameter.get("schema", {})
    limits = [f"{key} `{schema[key]}`" for key in _LIMITS if key in schema]
    kind = schema.get("type", "")
    told = parameter.get("description") or schema.get("description", "")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    return "; ".join(part for part in (kind, told, *limits) if part)


def _answer(response: dict[str, Any]) -> str:
    headers = response.get("headers", {})
    told = "".join(f"<br>`{name}`: {header['description']}" for name, header in headers.items())
    return response["description"] + told


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def document() -> str:
    settings = Settings.resolve({"profile": "tiny"})
    return render(create_app(make_engine(settings), settings).openapi())


if __name__ == "__main__":
    DOCUMENT.write_text(document())
