#!/usr/bin/env python3
"""The ten checks: is everything here, and does it work together? One line each, exit status 0 when none failed.

They talk to the service that runs here (the one that deploy_competitive.sh started, or one on the default port), or
else to one of their own on a free port, and use the miner's own classes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
DEFAULT_URL = "http://127.0.0.1:10006"
PROMPT, SEED = "a red cube", 1
WRONG_PROMPT = "a green snowman"
PATIENCE_S = 1800.0  # for one generation, behind whatever waits before it
ASKING_S = 30.0  # for all validators of the miner's check
MIN_GAUSSIANS = 7000  # fewer, and validators reject
BLACKLISTED_UID = 180

# No proxy: the service is on this machine.
http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(Exception):
    """The check did not pass; the message is what was measured."""


class Skipped(Exception):
    """There is nothing to check; the message says why."""


def expect(condition: object, measured: str) -> None:
    if not condition:
        raise Failed(measured)


class Service:
    """The generation service, and the one splat that most checks look at."""

    def __init__(self, url: str, about: dict[str, Any]) -> None:
        self.url, self.about = url, about
        self._generated: tuple[bytes, Any, float] | Failed | None = None

    def post(self, path: str, body: bytes, content_type: str) -> tuple[bytes, Any]:
        """(body, headers). Waits while the service is busy. Raises Failed on an error."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            request = urllib.request.Request(self.url + path, body, {"Content-Type": content_type})
            try:
                with http.open(request, timeout=PATIENCE_S) as answer:
                    return answer.read(), answer.headers
            except urllib.error.HTTPError as error:
                message = error.read().decode(errors="replace")[:300]
                wait = float(error.headers.get("Retry-After") or "inf")
                if error.code != 503 or time.monotonic() + wait > deadline:
                    raise Failed(f"{path} answered {error.code}: {message}") from None
                time.sleep(wait)
            except OSError as error:
                raise Failed(f"{path}: {error}") from None

    def generated(self) -> tuple[bytes, Any, float]:
        """(PLY, headers, seconds) of PROMPT with SEED; made at the first call."""
        if self._generated is None:
            form = urllib.parse.urlencode({"prompt": PROMPT, "seed": SEED}).encode()
            started = time.monotonic()
            try:
                ply, headers = self.post("/generate/", form, "application/x-www-form-urlencoded")
                self._generated = ply, headers, time.monotonic() - started
            except Failed as error:
                self._generated = error
        if isinstance(self._generated, Failed):
            raise self._generated
        return self._generated

    def splat(self) -> bytes:
        """The PLY. Raises Skipped when there is none: that is the full pipeline's failure."""
        try:
            ply, _, _ = self.generated()
        except Failed:
            ply = b""
        if not ply:
            raise Skipped("no splat to look at")
        return ply

    def seconds(self, stage: str) -> float:
        _, headers, _ = self.generated()
        seconds = json.loads(headers["X-Seconds"])
        expect(seconds.get(stage, 0) > 0, f"stage {stage} did not run; stages: {seconds}")
        return float(seconds[stage])

    def score(self, prompt: str) -> float:
        from common import spz

        body = {"prompt": prompt, "data": base64.b64encode(spz.compress(self.splat())).decode(), "compression": 2}
        answer, _ = self.post("/validate_txt_to_3d_ply/", json.dumps(body).encode(), "application/json")
        return float(json.loads(answer)["alignment_score"])


# ---- the checks: each gives back what it measured ----


def dependencies_installed(_: Service) -> str:
    import tomllib  # not in a Python that only calls enter_environment

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    wrong = []
    extras = project["optional-dependencies"]
    dependencies = [*project["dependencies"], *extras["miner"], *extras["service"]]
    for dependency in dependencies:
        name = normal(re.split(r"[\s<>=!~;\[]", dependency)[0])
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version.partition("+")[0] != exact.get(name):
            wrong.append(f"{name} {version} (want {exact.get(name)})")
    expect(not wrong, ", ".join(wrong))
    return f"{len(dependencies)} that pyproject.toml names, at the versions of constraints.txt"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def gpu_detected(service: Service) -> str:
    import torch

    from scripts.ops.environment import has_gpu

    profile = service.about.get("profile", "no")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {profile} profile"
    expect(not has_gpu(), f"nvidia-smi lists one, and torch {torch.__version__} can use none: a driver older than 580?")
    return f"none, {profile} profile"


def flux_generation(service: Service) -> str:
    return f"an image in {service.seconds('text_to_image'):.2f} s"


def background_removal(service: Service) -> str:
    seconds = service.seconds("background")
    service.seconds(service.about["generators"]["text"]["name"])  # without an object there is nothing to go on with
    return f"object found and cut out in {seconds:.2f} s"


def clip_tells_prompts_apart(service: Service) -> str:
    right, wrong = service.score(PROMPT), service.score(WRONG_PROMPT)
    measured = f"{right:.2f} for '{PROMPT}', {wrong:.2f} for '{WRONG_PROMPT}'"
    expect(right > wrong, measured)
    return measured


def full_pipeline(service: Service) -> str:
    ply, headers, seconds = service.generated()
    expect(ply, f"rejected: {headers.get('X-Rejected')}")
    measured = f"Score: {headers['X-Score']}, {headers['X-Num-Gaussians']} Gaussians, {len(ply) / 1e6:.1f} MB"
    return f"{measured} in {seconds:.1f} s"


def ply_structure_valid(service: Service) -> str:
    import numpy as np
    from plyfile import PlyData

    ply = service.splat()
    lines = ply.split(b"\n", 3)[:3]
    expect(lines[:2] == [b"ply", b"format binary_little_endian 1.0"], f"header starts with {lines}")
    expect(re.fullmatch(rb"element vertex \d+", lines[2]), f"third line is {lines[2]!r}")
    vertex = PlyData.read(io.BytesIO(ply))["vertex"]
    names = [each.name for each in vertex.properties]
    wanted = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", *(f"scale_{i}" for i in range(3))]
    missing = [name for name in [*wanted, *(f"rot_{i}" for i in range(4))] if name not in names]
    expect(not missing, f"properties missing: {missing}")
    expect(vertex.count >= MIN_GAUSSIANS, f"{vertex.count} Gaussians, fewer than {MIN_GAUSSIANS}")
    infinite = [name for name in names if not np.isfinite(vertex[name]).all()]
    expect(not infinite, f"values that are not finite in {infinite}")
    return f"{vertex.count} Gaussians, {len(names)} properties, all finite"


def task_manager_works(_: Service) -> str:
    import bittensor as bt

    from neurons.chain import Metagraph, Neuron
    from neurons.miner.assemble import assemble, open_books
    from neurons.miner.options import MinerOptions
    from neurons.miner.validators.blacklist import Blacklist
    from neurons.protocol import TextTask

    count = 4
    neurons = [Neuron(uid, f"validator {uid}", "127.0.0.1", 9000 + uid, 5000.0, True) for uid in range(count)]

    class Validators:
        """Stands in for the network: every validator has a task, and answers once all are asked."""

        def __init__(self) -> None:
            self.asked = 0
            self.all_asked = asyncio.Event()
            self.on_date: Any = None
            self.seconds_ahead: Any = None

        async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
            self.asked += 1
            if self.asked == count:
                self.all_asked.set()
            await self.all_asked.wait()
            synapse.task = TextTask(id=f"task of {target_axon.hotkey}", prompt=PROMPT)
            synapse.dendrite = bt.TerminalInfo(status_code=200)
            return synapse

    async def fetch() -> Metagraph:
        return Metagraph(17, tuple(neurons))

    async def pull(folder: Path) -> str:
        keypair = bt.Keypair.create_from_uri("//check")
        options = MinerOptions(
            network="rehearsal", wallet_name="", wallet_hotkey="", wallet_path=folder,
            workers=count, rehearsal_state=folder, metrics_port=0,
        )  # fmt: skip
        miner = await assemble(
            options,
            keypair,
            dendrite=Validators(),
            services=[],
            fetch=fetch,
            blacklist=Blacklist(()),
            books=open_books(options, keypair.ss58_address),
        )
        miner.directory.update(await fetch())
        miner.pool.ready.set()
        started = time.monotonic()
        miner.manager.sync()
        tasks = [await miner.manager.next_assignment() for _ in range(count)]
        seconds = time.monotonic() - started
        await miner.manager.close()
        ids = {task.task.id for task in tasks if task is not None}
        expect(len(ids) == count, f"{len(ids)} different tasks from {count} validators")
        return f"{count} validators polled at once, {count} tasks in {seconds * 1000:.0f} ms"

    async def bounded(folder: Path) -> str:
        try:
            async with asyncio.timeout(ASKING_S):
                return await pull(folder)
        except TimeoutError:
            raise Failed(f"{count} validators were not all asked within {ASKING_S:g} s") from None

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(bounded(Path(folder)))


def uid_180_blacklisted(_: Service) -> str:
    from neurons.chain import Metagraph, Neuron
    from neurons.miner import options
    from neurons.miner.validators.directory import Eligibility, ValidatorDirectory

    blacklist = frozenset(options.parse([]).blacklist)
    directory = ValidatorDirectory(Eligibility("own hotkey", "rehearsal", blacklist))
    neurons = [Neuron(uid, f"hotkey {uid}", "127.0.0.1", 9000, 5000.0, True) for uid in (179, BLACKLISTED_UID)]
    directory.update(Metagraph(17, tuple(neurons)))
    chosen = [neuron.uid for neuron in directory.eligible.values()]
    expect(chosen == [179], f"of 179 and {BLACKLISTED_UID}, the miner asks {chosen}")
    return f"UID {BLACKLISTED_UID} left out, its neighbour 179 kept"


def all_imports_work(_: Service) -> str:
    broken, count, needs_gpu = [], 0, 0
    for package in ("common", "generation", "neurons"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if ".weights.tiny" in module.name:  # modelling code inside a checkpoint: loaded with it
                continue
            count += 1
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "gsplat":  # installed where there is a GPU
                    broken.append(f"{module.name}: {error}")
                needs_gpu += 1
            except Exception as error:
                broken.append(f"{module.name}: {type(error).__name__}: {error}")
    expect(not broken, "; ".join(broken))
    return f"{count} modules" + (f", {needs_gpu} of them without its GPU library" if needs_gpu else "")


CHECKS: list[tuple[str, Callable[[Service], str]]] = [
    ("dependencies installed", dependencies_installed),
    ("GPU detected", gpu_detected),
    ("FLUX generation", flux_generation),
    ("background removal", background_removal),
    ("CLIP scores a right prompt above a wrong one", clip_tells_prompts_apart),
    ("full pipeline", full_pipeline),
    ("PLY structure valid", ply_structure_valid),
    ("AsyncTaskManager works", task_manager_works),
    ("UID 180 blacklisted", uid_180_blacklisted),
    ("all imports work", all_imports_work),
]


# ---- the service ----


def enter_environment() -> None:
    """Go on as .venv's Python. Ends with one line when there is no environment."""
    python = ROOT / ".venv/bin/python"
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return
    if not python.exists():
        sys.exit(f"{ROOT / '.venv'} is missing: scripts/test.sh makes it, and so does ./deploy_competitive.sh")
    os.execv(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])


def ready(url: str) -> dict[str, Any] | None:
    """What the service at ``url`` says about itself, once it is loaded; None when there is none, or something else."""
    while True:
        try:
            with http.open(f"{url}/health", timeout=10) as answer:
                about = json.load(answer)
            if about["status"] == "ready":
                return about if "profile" in about else None
            # An engine that was lost is started again: a second service would only be in its way.
            if about["status"] != "loading" and "to be started again" not in about["reason"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        time.sleep(0.5)


@contextlib.contextmanager
def service() -> Iterator[Service]:
    """The running service, or one that ends with the checks. Raises Failed when it does not come up."""
    deployed = ROOT / "run/url"
    for url in ([deployed.read_text().strip()] if deployed.exists() else []) + [DEFAULT_URL]:
        if (about := ready(url)) is not None:
            print(f"Using the service at {url}", flush=True)
            yield Service(url, about)
            return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    print(f"No service is running; starting one at {url}", flush=True)
    log = ROOT / "logs/checks.log"
    command = [sys.executable, "-m", "generation.serve_competitive", "--port", str(port), "--log-file", str(log)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        from scripts.ops.probe import wait_for_service

        if problem := wait_for_service(url, process.pid):
            raise Failed(f"{problem} (log: {log})")
        yield Service(url, ready(url) or {})
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class NoService(Service):
    """In place of a service that does not come up: what needs one fails with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__("", {})
        self._generated = Failed(reason)


def run(name: str, check: Callable[[Service], str], service: Service) -> bool:
    """Print the check's line; False when it failed."""
    try:
        verdict, measured = "PASS", check(service)
    except Skipped as reason:
        verdict, measured = "SKIP", str(reason)
    except Exception as error:
        verdict, measured = "FAIL", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    print(f"{verdict}  {name}: {' '.join(measured.split())}", flush=True)
    return verdict != "FAIL"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    enter_environment()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with contextlib.ExitStack() as stack:
        try:
            subject = stack.enter_context(service())
        except Failed as error:
            subject = NoService(str(error))
        passed = [run(name, check, subject) for name, check in CHECKS]
    print(f"{sum(passed)} of {len(CHECKS)} checks passed" if all(passed) else f"{passed.count(False)} checks failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
