"""``/docs``: the OpenAPI description as one HTML page, without scripts or external resources.

FastAPI's own page loads script and styles from a CDN, which may be out of reach, and whose script could call us.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

#: Content security policy: no resources, no scripts, and forms go to the service only.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"}
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430;
  background: #fff; overflow-wrap: anywhere } a { color: #0b62a4 }
details { border: 1px solid #d5dbe3; border-radius: 6px; margin: .5rem 0; padding: .5rem .8rem }
summary { cursor: pointer } summary b { display: inline-block; min-width: 3.2rem; color: #0b62a4 }
code { font: 13px ui-monospace, monospace } summary code { font-size: 15px; margin-right: .6rem }
table { border-collapse: collapse; width: 100%; margin: .3rem 0 } h2 { font-size: 1rem; margin: .8rem 0 .2rem }
td, th { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid #e8ecf1 }
td:first-child { white-space: nowrap }
form { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .6rem 1rem; margin: .6rem 0;
  align-items: end } label { font-size: .85rem; min-width: 0 }
input, button { font: inherit; font-size: 15px; padding: .35rem .6rem; border: 1px solid #b9c2cd; border-radius: 6px }
input { display: block; width: 100%; box-sizing: border-box }
button { justify-self: start; padding: .35rem 1.4rem; background: #0b62a4; border-color: #0b62a4; color: #fff }
@media (max-width: 32rem) { td { display: block } td + td { border: 0; padding-top: 0 } }
@media (prefers-color-scheme: dark) { body { color: #dfe5ec; background: #14181d } summary b, a { color: #6cb6ef }
  details, td, th { border-color: #333b45 } input { border-color: #4a545f; background: #1d232b; color: inherit } }
"""


def render(openapi: dict[str, Any]) -> str:
    """The page for a description as ``FastAPI.openapi()`` gives it."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
        f"<main><h1>{title}</h1><p>{escape(openapi['info'].get('description', ''))}</p>"
        '<p>For people there is <a href="studio/">Studio</a>; for programs <a href="openapi.json">OpenAPI</a>.</p>'
        f"{operations}</main></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<p>{escape(operation.get('description', ''))}</p>"]
    if parameters := operation.get("parameters"):
        rows = ([each["name"], f"in the {each['in']}; {about(each)}"] for each in parameters)
        parts.append(_table("Parameters", rows))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        for number, form in enumerate([schema] if "properties" in schema else schema["oneOf"]):
            parts.append(_table(f"Body: {kind}" if number == 0 else "or", _fields(form)))
        if kind == "multipart/form-data":
            parts.append(_form(path, schema["properties"]))
    parts.append(_table("Answers", (_answer(status, each) for status, each in sorted(operation["responses"].items()))))
    head = f"<b>{method.upper()}</b> <code>{escape(path)}</code>{escape(operation.get('summary', ''))}"
    return f"<details open><summary>{head}</summary>{''.join(parts)}</details>"


def _fields(form: dict[str, Any]) -> Iterator[list[str]]:
    for name, field in form["properties"].items():
        yield [name, ("required; " if name in form.get("required", ()) else "") + about(field)]


def _answer(status: str, answer: dict[str, Any]) -> list[str]:
    about = [answer["description"], ", ".join(answer.get("content", {}))]
    about += [f"{name}: {header.get('description', '')}" for name, header in answer.get("headers", {}).items()]
    return [status, *filter(None, about)]


def about(field: dict[str, Any]) -> str:
    """What a field or parameter may be, and its description, in words."""
    schema = field.get("schema", field)
    kinds = [
        "file" if each.get("format") == "binary" else each.get("type", "") for each in schema.get("anyOf", [schema])
    ]
    told = field.get("description") or schema.get("description")
    return "; ".join(filter(None, [" or ".join(filter(None, kinds)), *_limits(schema), told]))


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    """What a JSON schema allows, in words."""
    if "enum" in schema:
        yield f"one of {', '.join(map(str, schema['enum']))}"
    if (kind := schema.get("format", "binary")) != "binary":
        yield f"format {kind}"
    for least, most, unit in (("minimum", "maximum", ""), ("minLength", "maxLength", " characters")):
        low, high = (None if schema.get(key) is None else f"{schema[key]}".removesuffix(".0") for key in (least, most))
        if low is not None and high is not None:
            yield f"{low} to {high}{unit}"
        elif low is not None or high is not None:
            yield f"at least {low}{unit}" if high is None else f"at most {high}{unit}"
    if "default" in schema:
        yield f"default {json.dumps(schema['default'])}"


def _table(head: str, rows: Iterator[list[str]]) -> str:
    """The first cell of each row is a name; the others are lines about it."""
    body = "".join(f"<tr><td><code>{escape(name)}</code><td>{'<br>'.join(map(escape, about))}" for name, *about in rows)
    return f"<h2>{escape(head)}</h2><table>{body}</table>"


def _form(path: str, fields: dict[str, Any]) -> str:
    inputs = "".join(
        f'<label>{escape(name)} <input name="{escape(name)}" '
        f'type="{"file" if field.get("format") == "binary" else "text"}"></label>'
        for name, field in fields.items()
    )
    return (
        f'<form method="post" action="{escape(path)}" enctype="multipart/form-data">{inputs}<button>Try</button></form>'
    )
