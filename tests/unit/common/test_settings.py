"""Flags over variables over the file; what is wrong is named; `save` keeps what people wrote."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.checks import Choice, FilePath, Many, Switch, Whole, Words
from common.settings import CommandLine, Given, Score, setting, settings_of
from generation import arguments
from neurons.miner import options
from scripts.ops import cluster

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "configs" / "competitive.example.toml"
ALL = {**arguments.TABLES, **options.TABLES, **cluster.TABLES}


def address(value: object) -> str:
    if not str(value).startswith("http"):
        raise ValueError("is no address")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class Service:
    profile: str = setting("auto", Choice("auto", "full", "tiny"), "models")
    port: int = setting(10006, Whole(1, 65535), "port")
    name: str = setting("", Words(), "100 % a name")
    config: Path | None = setting(None, FilePath(exists=True), "a file")
    urls: tuple[str, ...] = setting(("http://a",), Many(address, "addresses", least=1), "services", secret=True)
    uids: tuple[Any, ...] = setting((180,), Many(int, "UIDs"), "left out", flags=("--left.out",))


TABLES = {"service": Service, "score": Score}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "competitive.toml"


def parse(*argv: str | Path, **options: Any) -> Given:
    return CommandLine("serve", "A service.", TABLES, **options).parse([str(word) for word in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path, **options: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    given = parse()
    assert given["service"] == Service()
    assert given["score"].validation_threshold == 0.6
    assert not given.has("service", "port")
    assert given.flags("service", "score") == []


def test_a_flag_overrides_a_variable_which_overrides_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(
        '[service]\nport = 1\nprofile = "full"\nname = "file"\nuids = [1, 2]\n[score]\nvalidation_threshold = 1\n'
    )
    monkeypatch.setenv("COMPETITIVE_SERVICE_PORT", "2")
    monkeypatch.setenv("COMPETITIVE_SERVICE_NAME", "variable")
    monkeypatch.setenv("COMPETITIVE_SERVICE_PROFILE", "")  # is not given
    given = parse("--config-file", file, "--port", "3")
    assert given["service"] == Service(port=3, name="variable", profile="full", uids=(1, 2))
    assert given["score"].validation_threshold == 1.0
    assert all(given.has("service", key) for key in ("port", "name", "profile", "uids"))
    again = parse(*given.flags("service", "score"))
    assert (again["service"], again["score"]) == (given["service"], given["score"])


def test_lists_after_one_flag_and_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse("--urls", "http://a", "http://b", "--port", "3", "--urls", "http://a", "--left.out", "7")
    assert (given["service"].urls, given["service"].uids) == (("http://a", "http://b"), (7,))
    assert parse("--left.out")["service"].uids == ()
    monkeypatch.setenv("COMPETITIVE_SERVICE_URLS", "http://a, http://b http://c,")
    assert parse()["service"].urls == ("http://a", "http://b", "http://c")


def test_flags_give_a_value_that_looks_like_one(file: Path) -> None:
    file.write_text('[service]\nname = "-x y"\n')
    given = parse("--config-file", file)
    assert given.flags("service") == ["--name=-x y"]
    assert parse(*given.flags("service"))["service"].name == "-x y"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[service]\nport = 70000", "[service] port = 70000: must be a whole number in 1..65535"),
        ('[service]\nport = "7000"', '[service] port = "7000": must be a whole number in 1..65535'),
        ("[service]\nport = true", "[service] port = true: must be a whole number"),
        ("[service]\nport = 1979-05-27", '[service] port = "1979-05-27": must be a whole number'),
        ("[score]\nvalidation_threshold = nan", "[score] validation_threshold = NaN: must be a number in 0..1"),
        ("[score]\nvalidation_threshold = true", "[score] validation_threshold = true: must be a number in 0..1"),
        ('[service]\nprofile = "huge"', '[service] profile = "huge": must be auto, full or tiny'),
        ("[service]\nname = 3", "[service] name = 3: must be text, in quotes"),
        ("[service]\nconfig = 3", "[service] config = 3: must be a path, in quotes"),
        ('[service]\nuids = "1"', '[service] uids = "1": must be a list of UIDs'),
        ("[service]\nurls = []", "[service] urls: must be at least 1 of addresses"),
        ("[service]\nprot = 1", "[service] prot: no such setting (meant: port?): there are profile, port, "),
        ("[service]\nzzz = 1", "[service] zzz: no such setting: there are profile, port, "),
        ("[servce]\nport = 1", "servce: no such table (meant: service?): there are network, wallet, score, service, m"),
        ("port = 1", "port: a setting belongs under the line of its table, [service]"),
        ("zzz = 1", "zzz: no such table: there are network, wallet"),
        ("[service]\nprofile = full", "Invalid value (at line 2, column 11): text and paths belong in quotes"),
        ("service = 1", "service: must be a table, [service]"),
        ("[[service]]\nport = 1", "service: must be a table, [service]"),
        ("[service]\nport = ", "Invalid value (at end of document)"),
        ("\udcff", "is not UTF-8"),
        ("#" * (1 << 20) + "\n", "larger than 1048576 bytes"),
        ("a = " + "[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(
    file: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    file.write_bytes(content.encode(errors="surrogateescape"))
    error = refused(capsys, "--config-file", file)
    assert error.startswith("serve: ")
    assert f"{file}: {said}" in error
    assert len(error.splitlines()) == 1


def test_everything_wrong_is_said_at_once(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('[service]\nport = 0\nprofile = "\\u001b[2J"\n')
    monkeypatch.setenv("COMPETITIVE_SERVICE_PORT", "many")
    monkeypatch.setenv("COMPETITIVE_SERVCE_PORT", "1")
    monkeypatch.setenv("COMPETITIVE_MINER_WHATEVER", "another process' own")
    assert refused(capsys, "--config-file", file, "--port", "-1", "--validation-threshold", "x\ny").splitlines() == [
        "serve: --port -1: must be a whole number in 1..65535",
        "serve: --validation-threshold x\\ny: must be a number in 0..1",
        "serve: COMPETITIVE_SERVCE_PORT: no such setting (meant: COMPETITIVE_SERVICE_PORT?)",
        "serve: COMPETITIVE_SERVICE_PORT=many: must be a whole number in 1..65535",
        f"serve: {file}: [service] port = 0: must be a whole number in 1..65535",
        f'serve: {file}: [service] profile = "\\u001b[2J": must be auto, full or tiny (--help shows all flags)',
    ]


@pytest.mark.parametrize("argv", [["--prot", "1"], ["--por", "1"], ["--port"], ["stray"], ["--urls"], ["--save"]])
def test_misuse_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    (line,) = refused(capsys, *argv).splitlines()
    assert line.startswith("serve: ")
    assert argv[0] in line


def test_a_mistyped_flag_gets_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--prot=1", "--profile", "tiny")
    assert error == "serve: unrecognized arguments: --prot=1 (meant: --port?) (--help shows all flags)\n"


def test_what_may_be_secret_is_not_repeated(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('[service]\nmnemonic = "hunter2"\nurls = ["hunter2"]\n[hunter]\nkey = "hunter2"\n')
    monkeypatch.setenv("COMPETITIVE_SERVICE_URLS", "hunter2")
    error = refused(capsys, "--config-file", file, "--urls", "hunter2")
    assert len(error.splitlines()) == 5
    assert "hunter2" not in error


def test_a_file_that_is_not_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--config-file {file}: No such file" in refused(capsys, "--config-file", file)
    assert f"--config-file {file.parent}: Is a directory" in refused(capsys, "--config-file", file.parent)
    assert "--config-file ~nobody-of-this-name/x: " in refused(capsys, "--config-file", "~nobody-of-this-name/x")
    assert parse(default_file=file)["service"] == Service()
    file.write_text("[service]\nport = 5\n[miner]\nanother = 'process reads this'\n")
    assert parse(default_file=file)["service"].port == 5


def test_files_as_windows_saves_them(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf[service]\r\nport = 5\r\n")
    given = parse("--config-file", file, "--profile", "full", "--save")
    given.save()
    assert parse("--config-file", file)["service"] == Service(port=5, profile="full")


def test_paths_begin_where_they_were_written(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = CommandLine("serve", "", TABLES, files_must_exist=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        (folder / "a.yaml").touch()
    file.write_text('[service]\nconfig = "a.yaml"\n')
    assert line.parse(["--config-file", "../competitive.toml"], cwd=elsewhere)["service"].config.samefile(
        tmp_path / "a.yaml"
    )
    assert line.parse(["--config", "a.yaml"], cwd=elsewhere)["service"].config == elsewhere / "a.yaml"
    assert parse("--config", "none.yaml")["service"].config == Path("none.yaml")
    with pytest.raises(SystemExit):
        line.parse(["--config", "none.yaml"], cwd=elsewhere)
    assert "--config none.yaml: No such file or directory" in capsys.readouterr().err


def test_a_refusal_names_what_gave_the_value(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[service]\nport = 5\n")
    monkeypatch.setenv("COMPETITIVE_SERVICE_NAME", "n")
    given = parse("--config-file", file, "--profile", "tiny")
    for key in ("port", "name", "profile", "config"):
        with pytest.raises(SystemExit):
            given.refuse("service", key, "no")
    assert [line.removesuffix(" (--help shows all flags)") for line in capsys.readouterr().err.splitlines()] == [
        f"serve: {file}: [service] port: no",
        "serve: COMPETITIVE_SERVICE_NAME: no",
        "serve: --profile: no",
        "serve: --config: no",
    ]


class TestSave:
    WRITTEN = """# mine
[service]
port = 5  # as the router has it
# profile = "tiny"

[miner]
# not this process'
workers = 3
"""

    def test_what_people_wrote_is_kept(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file.write_text(self.WRITTEN)
        file.chmod(0o640)
        monkeypatch.setenv("COMPETITIVE_SERVICE_NAME", "not a flag")
        given = parse(
            "--config-file", file, "--save", "--port", "6", "--validation-threshold", "0.7", "--left.out", "7", "9"
        )
        assert given.asked_to_save
        given.save()
        text = file.read_text()
        assert "# mine\n[service]\nport = 6  # as the router has it\n" in text
        assert '# profile = "tiny"' in text
        assert "# not this process'\nworkers = 3" in text
        assert tomllib.loads(text) == {
            "service": {"port": 6, "uids": [7, 9]}, "score": {"validation_threshold": 0.7}, "miner": {"workers": 3},
        }  # fmt: skip
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        assert list(file.parent.iterdir()) == [file]

    def test_the_next_start_needs_no_flags(self, file: Path, tmp_path: Path) -> None:
        line = CommandLine("serve", "", TABLES, default_file=file)
        words = ["--urls", "http://user:password@a", "--config", "a.yaml", "--port", "6", "--save"]
        given = line.parse(words, cwd=tmp_path / "deep")
        assert not file.exists()
        given.save()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600  # an endpoint may hold a password
        assert line.parse([])["service"] == given["service"]
        assert given["service"].config == tmp_path / "deep" / "a.yaml"

    def test_comments_stay_where_they_belong(self, file: Path) -> None:
        file.write_text("[service]\nport = 5\n\n# --- of the miner\n[miner]\n# its own\nworkers = 3\n")
        parse("--config-file", file, "--save", "--profile", "full", "--name", "n").save()
        assert file.read_text() == (
            '[service]\nport = 5\nprofile = "full"\nname = "n"\n\n# --- of the miner\n[miner]\n# its own\nworkers = 3\n'
        )

    @pytest.mark.parametrize(
        "content",
        [
            "service.port = 5\n",
            "service = {port = 5}\n",
            "[service]",
            "",
            "service.port = 5\nminer.workers = 3\nservice.uids = [3]\n",
        ],
    )
    def test_however_the_table_is_written(self, file: Path, content: str) -> None:
        file.write_text(content)
        parse("--config-file", file, "--save", "--port", "6", "--left.out", "1", "2").save()
        saved = tomllib.loads(file.read_text())
        assert saved["service"] == {"port": 6, "uids": [1, 2]}
        assert saved.get("miner", {"workers": 3}) == {"workers": 3}

    def test_it_goes_where_a_link_leads(self, file: Path, tmp_path: Path) -> None:
        link = tmp_path / "link.toml"
        link.symlink_to(file)
        parse("--config-file", link, "--save", "--port", "6").save()
        assert link.is_symlink()
        assert tomllib.loads(file.read_text()) == {"service": {"port": 6}}

    def test_what_is_wrong_is_not_saved(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file.write_text(self.WRITTEN)
        refused(capsys, "--config-file", file, "--save", "--port", "0")
        assert file.read_text() == self.WRITTEN


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_what_can_be_no_path_is_none(file: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file.write_text(f"[service]\nconfig = {json.dumps(text)}\n")
    assert "must be a path" in refused(capsys, "--config-file", file)
    assert "must be a path" in refused(capsys, "--config", text)


def test_help_tells_limits_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "--profile auto|full|tiny models (default: auto)",
        "--port PORT port; a whole number in 1..65535 (default: 10006)",
        "--name NAME 100 % a name",
        "--urls URLS [URLS ...] services; addresses (default: http://a)",
        "--left.out [UIDS ...] left out; UIDs (default: 180)",
    ):
        assert words in told


def test_the_declarations_need_nothing_installed() -> None:
    """The deploy script reads them before it installs anything."""
    code = "import generation.arguments, neurons.miner.options, sys; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True, timeout=60)


class TestSwitch:
    """One that is off where nothing says that it is on."""

    @staticmethod
    def parse(*argv: str, content: str = "") -> Given:
        @dataclass(frozen=True, kw_only=True)
        class Place:
            head: bool = setting(False, Switch(), "a head", flags=("--the-head",))

        file = Path(os.environ["SETTINGS"])
        file.write_text(content)
        return CommandLine("deploy", "", {"cluster": Place}, default_file=file).parse(argv)

    @pytest.fixture(autouse=True)
    def settings_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SETTINGS", str(tmp_path / "competitive.toml"))

    def test_flag_variable_and_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.parse()["cluster"].head is False
        assert self.parse("--the-head")["cluster"].head is True
        assert self.parse(content="[cluster]\nhead = true\n")["cluster"].head is True
        monkeypatch.setenv("COMPETITIVE_CLUSTER_HEAD", "false")
        given = self.parse(content="[cluster]\nhead = true\n")
        assert given["cluster"].head is False
        assert given.flags("cluster") == []
        assert self.parse("--the-head").flags("cluster") == ["--the-head"]

    def test_it_is_saved_as_what_toml_has_for_it(self) -> None:
        given = self.parse("--the-head", "--save")
        given.save()
        text = Path(os.environ["SETTINGS"]).read_text()
        assert tomllib.loads(text) == {"cluster": {"head": True}}

    @pytest.mark.parametrize("value", ['"true"', "1", "[]"])
    def test_what_is_neither_is_told(self, value: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.parse(content=f"[cluster]\nhead = {value}\n")
        assert "must be true or false" in capsys.readouterr().err


class TestTogether:
    """All tables in one command line, as the deploy script has them."""

    def test_no_flag_is_two_settings(self) -> None:
        flags = [flag for each in settings_of(ALL) for flag in each.flags]
        assert len(set(flags)) == len(flags)
        CommandLine("deploy", "", ALL)

    def test_defaults_pass_their_own_checks(self) -> None:
        for each in settings_of(ALL):
            if each.default not in (None, ""):
                value = str(each.default) if isinstance(each.default, Path) else each.default
                value = list(value) if isinstance(value, tuple) else value
                assert each.check.from_toml(value) == each.default, each


class TestExample:
    """configs/competitive.example.toml, as it stands and with every `# key = value` in it made one."""

    TEXT = EXAMPLE.read_text()

    def uncommented(self) -> dict[str, dict[str, Any]]:
        lines = []
        for line in self.TEXT.splitlines():
            told = line.removeprefix("# ")
            lines.append(told if told.partition(" =")[0].isidentifier() else line)
        return tomllib.loads("\n".join(lines))

    def test_as_it_stands_it_changes_nothing(self) -> None:
        given = CommandLine("deploy", "", ALL).parse(["--config-file", str(EXAMPLE)])
        assert all(given[table] == kind() for table, kind in ALL.items())

    def test_it_has_every_setting_and_no_other(self) -> None:
        assert {table: set(content) for table, content in self.uncommented().items()} == {
            table: {each.key for each in settings_of({table: kind})} for table, kind in ALL.items()
        }

    def test_it_shows_the_defaults(self) -> None:
        shown = self.uncommented()
        for each in settings_of(ALL):
            value = each.check.from_toml(shown[each.table][each.key])
            if each.default not in (None, ""):
                assert str(value) == str(each.default).removeprefix(f"{ROOT}/"), each
