"""From a fresh machine to a running miner: deploy_competitive.sh.

Makes the environment, starts the generation service and the miner (and, without a wallet, a rehearsal network for it)
in the background, and waits until they are healthy. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.log_lines import shown_network
from common.settings import PREFIX, CommandLine, Given
from generation.arguments import TABLES as SERVICE_TABLES
from generation.fleet import ray_environment
from generation.schema.hosts import parse_address
from neurons.miner.options import TABLES as MINER_TABLES
from scripts.ops import cluster, environment, probe, processes, systemd
from scripts.ops.processes import ROOT, RUN, Refused

PROGRAM = "deploy_competitive.sh"
LOOPBACK_VALIDATORS = 4
REHEARSAL_TIME_SCALE = 20
START_S = 180  # for the miner and the rehearsal network: importing bittensor is slow
LOG_LINES = 12  # of a process that did not start
#: What the processes run and read. Documents and tests may change beneath them.
CODE = ("common", "configs", "generation", "neurons", "requirements", "scripts/ops")
CODE_SUFFIXES = (".py", ".yaml", ".json", ".html", ".css", ".js", ".txt")
ENDED = 130  # exit status after Ctrl-C and the like


def parse(arguments: Sequence[str], caller: Path) -> Given:
    line = CommandLine(
        PROGRAM,
        "Installs what is missing, and starts the generation service and the miner; without a wallet also simulated "
        "validators, the rehearsal. It may be repeated: what runs is left alone. ./stop_competitive.sh stops all.",
        {**SERVICE_TABLES, **MINER_TABLES, **cluster.TABLES},
        default_file=ROOT / "competitive.toml",
        files_must_exist=True,
    )
    service = line.parser.add_mutually_exclusive_group()
    service.add_argument(
        "--install-service",
        action="store_true",
        help="save the flags, and write systemd units, which start everything at boot",
    )
    service.add_argument("--uninstall-service", action="store_true", help="stop and remove these units")
    line.parser.add_argument(
        "--only-prepare", action="store_true", help="install, save the flags where --save is given, and start nothing"
    )
    return line.parse(arguments, cwd=caller)


class Deployment:
    """What is to run, from the settings."""

    def __init__(self, given: Given) -> None:
        service, miner, wallet = given["service"], given["miner"], given["wallet"]
        self.network: str = given["network"].name
        if self.network == "auto":
            self.network = "finney" if wallet.name else "rehearsal"
        self.rehearsed = self.network == "rehearsal"
        if not (self.rehearsed or wallet.name):
            given.refuse("network", "name", f"{shown_network(self.network)} needs --wallet.name")
        # What the tiny models make earns nothing there but penalties: only who asks for them gets them.
        self.profile: str = service.profile if self.rehearsed or service.profile != "auto" else "full"
        self._wallet = wallet
        self.metrics_port: int = miner.metrics_port
        self.host, self.port = service.host, service.port
        self.url = f"http://{_reach(service.host)}:{service.port}"
        self.workers: int | None = miner.workers if given.has("miner", "workers") else None
        self.others: tuple[str, ...] = miner.endpoints if given.has("miner", "endpoints") else ()
        # What may hold a password goes by the environment: any user of the machine can read command lines.
        self._secrets = {
            given.variable_of("network", "name"): self.network,
            given.variable_of("miner", "endpoints"): " ".join(
                url.replace(",", "%2C") for url in (self.url, *self.others)
            ),
        }
        self.logs = {
            "ray": Path("logs/ray.log"),
            "generation_service": service.log_file,
            "rehearsal": Path("logs/rehearsal.log"),
            "miner": miner.log_file,
        }
        self.state = miner.rehearsal_state
        self._service = given.flags("service", "score")
        if miner.metrics_port and not given.has("service", "miner_url"):
            self._service += ["--miner-url", f"http://127.0.0.1:{miner.metrics_port}"]
        self._miner = given.flags("network", "wallet", "miner", "score")
        self.cluster = _Cluster(given) if given["cluster"].head or given["cluster"].join else None
        #: Also one whose Ray others start here.
        self.needs_ray = self.cluster is not None or bool(service.cluster)
        ray = [] if self.cluster is None else ["ray"]
        if self.cluster is not None and not self.cluster.is_head:
            self.names: tuple[str, ...] = ("ray",)
            return
        if self.cluster is not None:
            self._service += ["--cluster", self.cluster.address]
        self.names = (*ray, "generation_service", *(["rehearsal"] if self.rehearsed else []), "miner")

    def flags(self) -> str:
        """All that it was asked for, to be compared; as a hash, for addresses may hold passwords."""
        place = self.cluster and [self.cluster.is_head, self.cluster.address, str(self.cluster.token)]
        asked = json.dumps([self.profile, self._service, self._miner, self._secrets, place])
        return hashlib.sha256(asked.encode()).hexdigest()

    def arguments(self, name: str) -> list[str]:
        """Of one process."""
        if name == "ray":
            assert self.cluster is not None
            return self.cluster.arguments(tiny=self.profile == "tiny")
        if name == "generation_service":
            return [*self._service, "--profile", self.profile]
        if name == "rehearsal":
            scale = ("--time-scale", str(REHEARSAL_TIME_SCALE), "--endpoint", self.url, "--state", str(self.state))
            return ["--validators", str(LOOPBACK_VALIDATORS), *scale]
        return [*self._miner, "--workers", str(self.workers), "--status-file", "run/miner.status"]

    def check_hotkey(self) -> None:
        """Before a service loads for minutes in vain: the miner needs the hotkey's file. Raises Refused."""
        if self.rehearsed or "miner" not in self.names:
            return
        folder = Path(os.path.expanduser(self._wallet.path))
        hotkey = folder / self._wallet.name / "hotkeys" / self._wallet.hotkey
        try:
            hotkey.open("rb").close()
        except OSError as error:
            there = sorted(f"{path.parent.parent.name}/{path.name}" for path in folder.glob("*/hotkeys/*"))
            known = ", ".join(path for path in there if not path.endswith("pub.txt")) or "none"
            raise Refused(
                f"the hotkey's file {hotkey} can not be read: {error.strerror}. Wallets and hotkeys in {folder}: "
                f"{known}. Copy it there (docs/DEPLOYMENT_GUIDE.md, step 4), or name another: --wallet.name, "
                "--wallet.hotkey, --wallet.path"
            ) from None

    def places(self) -> int:
        """The miner's workers: one for each request that the services work on at once. A cluster may grow."""
        if self.needs_ray:
            return probe.MAX_WORKERS
        return probe.workers_for([self.url, *self.others])

    def variables(self, name: str) -> Mapping[str, str]:
        """The environment of one process. Raises Refused."""
        if name == "ray" and self.cluster is not None:
            return self.cluster.variables()
        return os.environ | self._secrets if name == "miner" else os.environ


class _Cluster:
    """What this machine is in a cluster. Raises Refused."""

    def __init__(self, given: Given) -> None:
        table, service = given["cluster"], given["service"]
        self.is_head: bool = table.head
        self.token: Path = service.cluster_token_file.expanduser()
        if table.head and table.join:
            given.refuse("cluster", "join", "a machine is a cluster's head, or joins one")
        if service.gpus != "all":
            given.refuse(
                "service", "gpus", "a cluster takes all GPUs that Ray finds; CUDA_VISIBLE_DEVICES hides others from it"
            )
        if not table.head:
            self.address: str = table.join
        elif service.cluster:
            self.address = service.cluster
        else:
            self.address = f"{cluster.own_address(None)}:{cluster.HEAD_PORT}"
        self.place = parse_address(self.address)
        host = self.place[0]
        self.own = host if table.head else cluster.own_address(host)

    def check(self, tiny: bool) -> None:
        """Before anything is installed, what can not work. Prints what it found. Raises Refused."""
        found = cluster.check_network(self.own, None if self.is_head else self.place[0])
        cluster.check_shared_memory()
        if not (self.is_head or tiny or environment.has_gpu()):
            raise Refused(
                "this machine has no GPU to give (nvidia-smi lists none). With --profile tiny it gives an engine on "
                "its CPU"
            )
        print(f"Cluster network: {found}")
        first, last = min(self.place[1], *cluster.PORTS.values()), cluster.PORTS["--max-worker-port"]
        print(f"  Ray listens on every interface: let nobody but the cluster's machines reach ports {first} to {last}")

    def variables(self) -> dict[str, str]:
        """For Ray. Raises Refused where the token is not good."""
        try:
            return ray_environment.environment(self.token)
        except ValueError as error:
            raise Refused(str(error)) from error

    def arguments(self, tiny: bool) -> list[str]:
        on_cpu = 0 if self.is_head or not tiny or environment.has_gpu() else 1
        return cluster.ray_arguments(self.place, self.own, self.is_head, on_cpu)

    def wait(self, pid: int) -> str | None:
        return cluster.wait_for_ray(RUN / "ray.out", pid, self.token)


def _reach(host: str) -> str:
    """Where to reach a service that listens there."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def deploy(given: Given, caller: Path) -> None:
    """Raises Refused or InstallError, each with a line that says why not."""
    deployment = Deployment(given)
    os.chdir(ROOT)
    if given.args.uninstall_service or given.args.install_service:
        _change_service(given, deployment, caller)
        return
    if given.args.only_prepare:
        _prepare(given, deployment, caller)
        print("Prepared; nothing was started.")
        return
    for folder in ("logs", "data"):
        Path(folder).mkdir(exist_ok=True)
    with processes.lock():
        if processes.forget_before_reboot():
            print("What was deployed before ended with the machine's restart; it is started anew.")
        if _runs_already(deployment):
            if given.asked_to_save:
                _save(given, caller)
            print("Already running; nothing to do.")
            _summarise(deployment)
            return
        problem = None
        if "generation_service" in deployment.names:
            problem = probe.check_port(deployment.host, deployment.port)
            if problem:
                problem += ". Another port: --port"
        if deployment.cluster is not None:
            problem = problem or cluster.check_ports(deployment.cluster.place, deployment.cluster.is_head)
        if problem:
            raise Refused(problem)
        deployment.check_hotkey()
        _prepare(given, deployment, caller)
        try:
            _start(deployment)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _say_to_who_ended_it("\nStopping what was started ...")
            processes.stop_all()
            raise
        _summarise(deployment)


def _prepare(given: Given, deployment: Deployment, caller: Path) -> None:
    """The environment, the GPU code, the settings' file, and a cluster's token."""
    joined = deployment.cluster
    if joined is not None:
        joined.check(deployment.profile == "tiny")
        if joined.is_head and cluster.make_token(joined.token):
            print(f"Made the cluster's token, {joined.token}")
        joined.variables()  # refuses a token that is not good
    extras = [] if deployment.profile == "tiny" else environment.hardware_extras()
    environment.ensure([*environment.PLAIN, *extras, *(["cluster"] if deployment.needs_ray else [])])
    if given.asked_to_save:
        _save(given, caller)
    if "gpu" in extras and subprocess.run([environment.PYTHON, "-m", "scripts.ops.build_gsplat"]).returncode != 0:
        raise Refused("gsplat, which a GPU needs, is not built: the reason is above. Without one: --profile tiny")


def _change_service(given: Given, deployment: Deployment, caller: Path) -> None:
    """Installs the systemd units or takes them away."""
    if given.args.uninstall_service:
        print("\n".join(systemd.uninstall()))
        return
    if variables := sorted(name for name, value in os.environ.items() if name.startswith(PREFIX) and value):
        raise Refused(f"the units will not see {', '.join(variables)}: give that as flags, which are saved")
    user = systemd.check_can_install()
    with processes.lock():
        if any(processes.state(name) != "absent" for name in processes.MODULES):
            raise Refused("it is deployed without systemd. Stop that first: ./stop_competitive.sh")
    # As the user whom the folder belongs to, so that the files are that user's.
    words = [word for word in sys.argv[1:] if word not in ("--install-service", "--save")]
    home = {**os.environ, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    command = [sys.executable, __file__, *words, "--save", "--only-prepare"]
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    prepared = subprocess.run(command, cwd=caller, env=home, user=user.pw_uid, group=user.pw_gid, extra_groups=groups)
    if prepared.returncode != 0:
        raise Refused(f"it could not be prepared as {user.pw_name}: the reason is above")
    print("\n".join(systemd.install(deployment.names, user.pw_name)))
    print(f"Started. See: systemctl status '{systemd.unit('*')}', journalctl -f -u '{systemd.unit('*')}'")
    print(
        f"Stop: systemctl stop {systemd.TARGET}. After a change of competitive.toml: systemctl restart {systemd.TARGET}"
    )


def _save(given: Given, caller: Path) -> None:
    """In the environment's Python, which has what writes the file."""
    command = [str(environment.PYTHON), __file__, *sys.argv[1:], "--only-save"]
    if Path(sys.executable) == environment.PYTHON:
        given.save()
    elif subprocess.run(command, cwd=caller).returncode != 0:
        raise Refused("the settings could not be saved: the reason is above")


def _runs_already(deployment: Deployment) -> bool:
    """Raises Refused for what is neither running as it is asked for nor stopped."""
    processes.refuse_foreign(list(processes.MODULES))
    states = {name: processes.state(name) for name in deployment.names}
    for name, state in states.items():
        if state == "dead":
            pid = processes.read_pid(name)
            raise Refused(f"{name} is dead behind a stale PID file (PID {pid}). Clear up: ./stop_competitive.sh")
    alive = [name for name, state in states.items() if state != "absent"]
    if not alive:
        return False
    try:
        same = (RUN / "flags").read_text() == deployment.flags()
    except OSError:
        same = False
    if not same:
        raise Refused("already running with other flags. Stop it first: ./stop_competitive.sh")
    if not (RUN / "code").exists() or (RUN / "code").read_text() != _code():
        raise Refused(
            "already running, and its code or configs have changed since: a git pull? For the new ones stop it first: "
            "./stop_competitive.sh"
        )
    if len(alive) < len(states):
        raise Refused("only a part of it is running. Stop it first: ./stop_competitive.sh")
    for name, state in states.items():
        if state == "crashed":
            raise Refused(
                f"{name} crashed and waits to be started again: see {deployment.logs[name]} and run/{name}.out"
            )
    return True


def _code() -> str:
    """The state of what the processes run and read, as a hash."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in CODE_SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _start(deployment: Deployment) -> None:
    url, network = deployment.url, deployment.state / "network.json"
    (RUN / "flags").write_text(deployment.flags())
    (RUN / "code").write_text(_code())
    joined = deployment.cluster
    if joined is not None:
        if not joined.is_head:
            cluster.check_reach(joined.place)
        print(f"Starting Ray {'as the head' if joined.is_head else 'to join'} on {joined.address} ...", flush=True)
        _started(deployment, "ray", joined.wait)
        if not joined.is_head:
            return
        print(_how_to_join(joined), flush=True)
    (RUN / "url").write_text(f"{url}\n")
    print(f"Starting the generation service on {url} ...", flush=True)
    _started(deployment, "generation_service", lambda pid: probe.wait_for_service(url, pid))
    if deployment.rehearsed:
        print("Starting the rehearsal network ...", flush=True)
        network.unlink(missing_ok=True)
        _started(deployment, "rehearsal", lambda pid: probe.wait_for_file(network, pid, START_S, status=False))
    print("Starting the miner ...", flush=True)
    if deployment.metrics_port and (problem := probe.check_port("127.0.0.1", deployment.metrics_port)):
        print(f"  it goes without metrics, and Studio shows nothing of it: {problem}. Another port: --metrics-port")
    status = RUN / "miner.status"
    status.unlink(missing_ok=True)
    deployment.workers = deployment.workers or deployment.places()
    (RUN / "workers").write_text(f"{deployment.workers}\n")
    _started(deployment, "miner", lambda pid: probe.wait_for_file(status, pid, START_S, status=True))


def _started(deployment: Deployment, name: str, wait: Callable[[int], str | None]) -> None:
    """Start it and wait for it; a failure shows the last lines that it logged since. Raises Refused."""
    log = deployment.logs[name]
    before = log.stat().st_size if log.exists() else 0
    pid = processes.start(name, deployment.arguments(name), log, deployment.variables(name))
    problem = wait(pid)
    if problem is None:
        (RUN / f"{name}.up").touch()
        return
    print(problem, flush=True)
    print(f"--- the last lines of {log} and run/{name}.out:", file=sys.stderr)
    for path, begin in ((log, before), (RUN / f"{name}.out", 0)):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        new = content[begin:] if begin <= len(content) else content  # shorter: it was rotated
        print("\n".join(new.decode(errors="replace").splitlines()[-LOG_LINES:]), file=sys.stderr)
    raise Refused(f"{name} did not start: see above")


def _summarise(deployment: Deployment) -> None:
    pids = {name: processes.read_pid(name) for name in deployment.names}
    joined = deployment.cluster
    if joined is not None and not joined.is_head:
        print(
            f"Running: Ray, which has joined {joined.address} from {joined.own} (PID {pids['ray']}), log: logs/ray.log"
        )
        print("Next: the head's /health lists this machine's engines; ./stop_competitive.sh takes them away again")
        return
    workers = (RUN / "workers").read_text().strip()
    logs, url = deployment.logs, deployment.url
    print("Running:")
    if joined is not None:
        print(f"  cluster's head      {joined.address} (PID {pids['ray']}), log: logs/ray.log")
    print(f"  generation service  {url} (PID {pids['generation_service']}), log: {_short(logs['generation_service'])}")
    if deployment.rehearsed:
        print(
            f"  rehearsal network   {LOOPBACK_VALIDATORS} validators on loopback (PID {pids['rehearsal']}), "
            f"log: {_short(logs['rehearsal'])}"
        )
    network = shown_network(deployment.network)
    print(f"  miner               {workers} workers on network {network} (PID {pids['miner']}), log: {logs['miner']}")
    if deployment.rehearsed:
        print("*** REHEARSAL: nothing is submitted to the Bittensor network. To mine for real: --wallet.name NAME ***")
    elif deployment.profile == "tiny":
        print(f"*** PROFILE tiny ON {network}: its models earn nothing. To mine for real: --profile full ***")
    if (status := probe.read_status(RUN / "miner.status")) not in ("", "ready"):
        print(f"*** The miner has no work yet: {status} ***")
    print("Next:")
    if joined is not None:
        print(_how_to_join(joined))
    print(f"  tail -F {_short(logs['miner'])}       tasks, scores and feedback as they come")
    print(f"  {url}/studio/ in a browser: make splats, see what the miner earns")
    print(f"  curl -F 'prompt=a red cube' {url}/generate/ -o data/cube.ply")
    print("  ./test_competitive.py        check everything")
    print("  ./stop_competitive.sh        stop everything")


def _how_to_join(head: _Cluster) -> str:
    return (
        f"  ./deploy_competitive.sh --join {head.address}   on each other machine, once it has a copy of the token\n"
        f"  {head.token} in the same place and with the same mode (scp -p)"
    )


def _short(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say_to_who_ended_it(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str], caller: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if arguments[-1:] == ["--only-save"]:
        parse(arguments[:-1], caller).save()
        return 0
    try:
        deploy(parse(arguments, caller), caller)
    except (Refused, environment.InstallError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say_to_who_ended_it(f"\n{PROGRAM}: ended; nothing of it runs. Run it again to go on from here")
        return ENDED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path.cwd()))
