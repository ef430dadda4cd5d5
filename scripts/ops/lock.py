"""Writes the locked versions: constraints.txt, and requirements/EXTRA.txt with hashes, from pyproject.toml.

.venv/bin/python -m scripts.ops.lock            after a change of pyproject.toml; versions that still fit stay
.venv/bin/python -m scripts.ops.lock --upgrade  the newest versions that pyproject.toml allows

The locks hold for Linux and every Python that pyproject.toml allows. pip's indexes are not asked, only the public one:
the hashes are of its files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib

from scripts.ops.environment import ROOT, UV, uv_variables

HEAD = "# Exact versions of everything, written by scripts.ops.lock. With hashes: requirements/*.txt\n"
PYTHON = "3.11"  # the oldest that is supported
HASHED = ("-c", "constraints.txt", "--universal", "--generate-hashes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="newer versions, where there are any")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())

    constraints = ROOT / "constraints.txt"
    _compile("pyproject.toml", "--all-extras", "--python-platform", "linux", *upgrade, "-o", "constraints.txt")
    constraints.write_text(HEAD + constraints.read_text())
    for extra in settings["project"]["optional-dependencies"]:
        _compile("pyproject.toml", "--extra", extra, *HASHED, "-o", f"requirements/{extra}.txt")
    build = "\n".join(["uv", *settings["build-system"]["requires"]])
    _compile("-", *HASHED, *upgrade, "-o", "requirements/bootstrap.txt", given=build)


def _compile(*arguments: str, given: str = "") -> None:
    variables = uv_variables({}, os.environ)
    command = [
        str(UV),
        "pip",
        "compile",
        "--quiet",
        "--no-annotate",
        "--no-header",
        "--python-version",
        PYTHON,
        *arguments,
    ]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, input=given, text=True).returncode != 0:
        sys.exit("lock: uv could not resolve the packages: its reason is above")


if __name__ == "__main__":
    main()
