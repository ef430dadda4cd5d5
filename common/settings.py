"""Settings from flags, environment variables and one TOML file. A flag overrides a variable, a variable the file.

A process declares the tables that it reads as frozen dataclasses, whose fields `setting` makes:

    @dataclass(frozen=True, kw_only=True)
    class Service:
        port: int = setting(10006, Whole(1, 65535), "port to listen on")

    given = CommandLine("serve", "The service.", {"service": Service}).parse(["--port", "8080"])
    given["service"].port       # 8080; also COMPETITIVE_SERVICE_PORT, or port = 8080 in the file's [service]

Standard library alone, save for `Given.save`: `deploy_competitive.sh` checks what it is given before anything is
installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from common.checks import TEXT, Check, FilePath, Many, Number, Switch
from common.log_lines import escape
from common.version import VERSION

#: All tables of the file. A process reads its own, and leaves the others to theirs.
TABLES = ("network", "wallet", "score", "service", "miner", "cluster")
PREFIX = "COMPETITIVE_"
MAX_FILE_BYTES = 1 << 20
MAX_SHOWN_CHARACTERS = 120

Source = Literal["flag", "variable", "file"]


def setting(
    default: Any,
    check: Check,
    help: str,
    *,
    flags: Sequence[str] = (),
    default_is: str = "",
    metavar: str = "",
    secret: bool = False,
) -> Any:
    """A field of a table. `flags`: if not the field's name with dashes; `default_is`: the default in words, if its
    value is not telling; `secret`: the value may hold a password, and is never shown.
    """
    told = {
        "check": check, "help": help, "flags": tuple(flags), "default_is": default_is, "metavar": metavar,
        "secret": secret,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class Setting:
    """One setting: its three names, and the check of its values."""

    table: str
    key: str
    check: Check
    help: str
    flags: tuple[str, ...]
    default: Any
    default_is: str
    metavar: str
    secret: bool

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{PREFIX}{self.table}_{self.key}".upper()


def settings_of(tables: Mapping[str, type]) -> list[Setting]:
    """All settings of these tables, in their order."""
    found = []
    for table, kind in tables.items():
        for field in dataclasses.fields(kind):
            told = dict(field.metadata)
            told["flags"] = told["flags"] or ("--" + field.name.replace("_", "-"),)
            told["default_is"] = told["default_is"] or _shown_default(field.default)
            found.append(Setting(table, field.name, default=field.default, **told))
    return found


def _shown_default(value: Any) -> str:
    if isinstance(value, tuple | frozenset):
        return " ".join(str(each) for each in value)
    return "" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The table [score], which service and miner share."""

    validation_threshold: float = setting(
        0.6, Number(0, 1), "lowest final score that is submitted; validators accept from 0.6", metavar="X"
    )


class Given:
    """What was given, checked and merged: `given["service"]` is that table's dataclass, with defaults filled in."""

    def __init__(
        self,
        prog: str,
        args: argparse.Namespace,
        settings: Sequence[Setting],
        tables: Mapping[str, type],
        values: Mapping[Source, Mapping[Setting, Any]],
        file: Path | None,
    ) -> None:
        """`values`: the strongest source first."""
        self.args = args
        self.asked_to_save: bool = args.save
        self._prog = prog
        self._settings = settings
        self._values = values
        self._file = file
        self._merged: dict[Setting, Any] = {}
        for source in reversed(list(values)):
            self._merged |= values[source]
        self._tables = {
            name: kind(**{each.key: value for each, value in self._merged.items() if each.table == name})
            for name, kind in tables.items()
        }

    def __getitem__(self, table: str) -> Any:
        return self._tables[table]

    def has(self, table: str, key: str) -> bool:
        """Whether a flag, variable or file sets it."""
        return any((each.table, each.key) == (table, key) for each in self._merged)

    def flags(self, *tables: str) -> list[str]:
        """Flags for all values given for these tables, whatever their source.

        Without values that may hold a password, since any user can read command lines. See `variable_of`.
        """
        words = []
        for each in self._settings:
            if each.table in tables and each in self._merged and not each.secret:
                value = self._merged[each]
                if isinstance(each.check, Many):
                    words += [each.flags[0], *map(str, value)]
                elif isinstance(each.check, Switch):
                    words += [each.flags[0]] if value else []
                elif str(value).startswith("-"):
                    words.append(f"{each.flags[0]}={value}")
                else:
                    words += [each.flags[0], str(value)]
        return words

    def variable_of(self, table: str, key: str) -> str:
        """The name of a setting's environment variable."""
        (each,) = (each for each in self._settings if (each.table, each.key) == (table, key))
        return each.variable

    def refuse(self, table: str, key: str, reason: str) -> NoReturn:
        """Exits with status 2 and one line about a value that is wrong in combination with others."""
        (each,) = (each for each in self._settings if (each.table, each.key) == (table, key))
        source = next((source for source, values in self._values.items() if each in values), None)
        _refuse(self._prog, [f"{_named(each, source or 'flag', self._file)}: {reason}"])

    def save(self) -> None:
        """Writes the values of flags into the file, and keeps its comments. Raises OSError."""
        import tomlkit

        assert self._file is not None
        file = self._file.resolve()
        document = tomlkit.parse(_read(file) if file.exists() else _HEADER)
        for each, value in self._values["flag"].items():
            if each.table not in document:
                document[each.table] = tomlkit.table()
            table: Any = document[each.table]
            # Comments and empty lines at the end of a table belong to the next one.
            body = getattr(table.value, "body", [])
            end = max((index for index, (key, _) in enumerate(body, start=1) if key is not None), default=len(body))
            after, body[end:] = body[end:], []
            table[each.key] = _as_toml(value)
            body.extend(after)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        # An endpoint may hold a password.
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as new:
                new.write(tomlkit.dumps(document))
                new.flush()
                os.fsync(new.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


_HEADER = "# Settings of service and miner. All there are: configs/competitive.example.toml\n"


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _refuse(self.prog, [message.removeprefix("argument ")])


class CommandLine:
    """The command line of one process. Flags that are not settings may be added to `parser`."""

    def __init__(
        self,
        prog: str,
        description: str,
        tables: Mapping[str, type],
        *,
        default_file: Path | None = None,
        files_must_exist: bool = False,
    ) -> None:
        """`default_file` is read if it exists and no other is named. `files_must_exist`: whether files that a process
        needs at its start have to exist already.
        """
        self._tables = dict(tables)
        self._settings = settings_of(tables)
        self._default_file = default_file
        self._files_must_exist = files_must_exist
        self.parser = _Parser(prog=prog, description=description, allow_abbrev=False)
        add = self.parser.add_argument
        add("--version", action="version", version=f"{prog} {VERSION}")
        add("--config-file", metavar="PATH", help="TOML file of settings; flags and variables override it")
        add("--save", action="store_true", help="write the given flags into that file, so that later starts need none")
        for table in tables:
            group = self.parser.add_argument_group(f"[{table}]")
            for each in self._settings:
                if each.table == table:
                    _add(group, each)

    def parse(self, argv: Sequence[str], cwd: Path | None = None) -> Given:
        """The settings that are given. Exits with status 2 and a line per error, with name, value and limit.

        `cwd`: where relative paths of flags and variables begin; None: the process's working directory.
        """
        prog = self.parser.prog
        args, unknown = self.parser.parse_known_args(argv)
        if unknown:
            flags = [flag for each in self._settings for flag in each.flags]
            meant = _nearest(unknown[0].partition("=")[0], flags)
            self.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        try:
            named = None if args.config_file is None else _join(cwd, Path(args.config_file).expanduser())
        except RuntimeError as error:  # a ~ of nobody
            _refuse(prog, [f"--config-file {args.config_file}: {error}"])
        file = named or self._default_file
        if args.save and file is None:
            _refuse(prog, ["--save needs --config-file PATH"])
        document: dict[str, Any] = {}
        if file is not None and (file.exists() or (named is not None and not args.save)):
            try:
                document = tomllib.loads(_read(file))
            except OSError as error:
                _refuse(prog, [f"--config-file {file}: {error.strerror}"])
            except (ValueError, RecursionError) as error:
                hint = ": text and paths belong in quotes" if str(error).startswith("Invalid value") else ""
                _refuse(prog, [f"--config-file {file}: {error}{hint}"])
        problems: list[str] = []
        values: dict[Source, dict[Setting, Any]] = {
            "flag": dict(self._from_flags(args, cwd, problems)),
            "variable": dict(self._from_environment(cwd, problems)),
            "file": dict(self._from_file(document, file, problems)),
        }
        if problems:
            _refuse(prog, problems)
        return Given(prog, args, self._settings, self._tables, values, file)

    def _from_flags(
        self, args: argparse.Namespace, cwd: Path | None, problems: list[str]
    ) -> Iterator[tuple[Setting, Any]]:
        for each in self._settings:
            given = getattr(args, f"{each.table}.{each.key}")
            if given is not None:
                read = each.check.from_toml if isinstance(each.check, Many) else each.check.from_text
                yield from self._checked(each, read, given, "flag", cwd, None, problems)

    def _from_environment(self, cwd: Path | None, problems: list[str]) -> Iterator[tuple[Setting, Any]]:
        known = {each.variable: each for each in self._settings}
        others = tuple(f"{PREFIX}{table}_".upper() for table in TABLES if table not in self._tables)
        for variable, text in sorted(os.environ.items()):
            if not variable.startswith(PREFIX) or variable.startswith(others) or not text:
                continue
            each = known.get(variable)
            if each is None:
                problems.append(f"{_key(variable)}: no such setting{_nearest(variable, known)}")
            else:
                yield from self._checked(each, each.check.from_text, text, "variable", cwd, None, problems)

    def _from_file(
        self, document: Mapping[str, Any], file: Path | None, problems: list[str]
    ) -> Iterator[tuple[Setting, Any]]:
        for table, content in document.items():
            if table not in TABLES:
                problems.append(f"{file}: {_key(table)}: {self._why_no_table(table, content)}")
            elif not isinstance(content, dict):
                problems.append(f"{file}: {table}: must be a table, [{table}]")
            elif table in self._tables:
                known = {each.key: each for each in self._settings if each.table == table}
                for key, value in content.items():
                    each = known.get(key)
                    if each is None:  # its value may be anything, a mnemonic too
                        problems.append(
                            f"{file}: [{table}] {_key(key)}: no such setting{_nearest(key, known)}: "
                            f"there are {', '.join(known)}"
                        )
                    else:
                        folder = None if file is None else file.absolute().parent
                        yield from self._checked(each, each.check.from_toml, value, "file", folder, file, problems)

    def _why_no_table(self, name: str, content: Any) -> str:
        tables = [each.table for each in self._settings if each.key == name]
        if tables and not isinstance(content, dict):
            return f"a setting belongs under the line of its table, [{'] or ['.join(tables)}]"
        return f"no such table{_nearest(name, TABLES)}: there are {', '.join(TABLES)}"

    def _checked(
        self,
        each: Setting,
        read: Callable[[Any], Any],
        given: Any,
        source: Source,
        base: Path | None,
        file: Path | None,
        problems: list[str],
    ) -> Iterator[tuple[Setting, Any]]:
        try:
            value = read(given)
            if isinstance(value, Path):
                value = _join(base, value)
                if self._files_must_exist and getattr(each.check, "exists", False):
                    with value.expanduser().open("rb"):
                        pass
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a ~ of nobody
            shown = "" if each.secret else _shown(given, source)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            problems.append(f"{_named(each, source, file)}{shown}: {reason}")
        else:
            yield each, value


def _add(group: argparse._ArgumentGroup, each: Setting) -> None:
    dest = f"{each.table}.{each.key}"
    if isinstance(each.check, Switch):
        group.add_argument(*each.flags, dest=dest, action="store_const", const="true", help=each.help)
        return
    choices = "|".join(getattr(each.check, "words", ()))
    metavar = each.metavar or choices or each.key.upper()
    default = f" (default: {each.default_is})" if each.default_is else ""
    options: dict[str, Any] = {}
    if isinstance(each.check, Many):
        options = {"nargs": "+" if each.check.least else "*", "action": "extend"}
    limits = "" if choices or each.check.limits in (FilePath.limits, TEXT) else f"; {each.check.limits}"
    group.add_argument(
        *each.flags,
        dest=dest,
        metavar=metavar,
        help=f"{each.help}{limits}{default}".replace("%", "%%"),
        **options,
    )


def _read(file: Path) -> str:
    """Raises OSError or ValueError."""
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None


def _join(base: Path | None, path: Path) -> Path:
    return path if base is None or path.is_absolute() or str(path).startswith("~") else base / path


def _named(each: Setting, source: Source, file: Path | None) -> str:
    if source == "file":
        return f"{file}: [{each.table}] {each.key}"
    return each.variable if source == "variable" else each.flags[0]


def _shown(value: Any, source: Source) -> str:
    if source == "file":
        text = json.dumps(value, default=str, ensure_ascii=False)
    else:
        text = " ".join(value) if isinstance(value, list) else str(value)
    text = escape(text)
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = text[:MAX_SHOWN_CHARACTERS] + "..."
    return {"file": " = ", "variable": "=", "flag": " "}[source] + text


def _key(key: str) -> str:
    return escape(key)[:MAX_SHOWN_CHARACTERS]


def _nearest(name: str, known: Collection[str]) -> str:
    """`` (meant: ...?)`` for a name that is mistyped."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" (meant: {found[0]}?)" if found else ""


def _as_toml(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Path):
        return str(value) if str(value).startswith("~") else str(value.absolute())
    return value


def _refuse(prog: str, problems: Collection[str]) -> NoReturn:
    lines = [f"{prog}: {problem}" for problem in problems]
    sys.stderr.write("\n".join(lines) + " (--help shows all flags)\n")
    raise SystemExit(2)
