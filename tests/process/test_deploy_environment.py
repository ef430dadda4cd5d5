"""deploy_competitive.sh and scripts/install.sh: the environment, the compiler and the build that a GPU needs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.deployment import PIP, Clone, install, refused, stub, with_gpu


@pytest.mark.slow
def test_an_environment_whose_python_is_gone_is_made_anew(clone: Clone) -> None:
    python = clone.path / ".venv/bin/python3"
    for link in (python, python.with_name("python")):
        link.unlink(missing_ok=True)
        link.symlink_to("/usr/bin/python-of-an-older-release")
    result = clone.deploy()
    assert "Making the environment" in result.stdout
    assert "could not make the environment" not in result.stderr
    assert python.exists()


def test_no_fitting_python(clone: Clone) -> None:
    shutil.rmtree(clone.path / ".venv")
    for name in ("python3", "python3.11", "python3.12", "python"):
        path = stub(clone, name, "exit 1")
    refused(clone.deploy(PATH=path), "Python 3.11 or 3.12")


@pytest.mark.slow
def test_a_missing_compiler_matters_with_a_gpu_only(clone: Clone) -> None:
    tools = clone.path / "tools"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if tool.name not in ("c++", "g++", "nvidia-smi") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    assert clone.deploy(PATH=str(tools)).returncode == 0
    clone.stop()
    stub(clone, "nvidia-smi", "echo 'GPU 0: NVIDIA'")
    refused(clone.deploy(PATH=f"{clone.path / 'stubs'}:{tools}"), "no C++ compiler", "gsplat")
    stub(clone, "g++", "exit 0")
    assert clone.deploy(PATH=f"{clone.path / 'stubs'}:{tools}").returncode == 0
    *_, packages, project = (clone.path / "pip-calls").read_text().splitlines()
    locks = "-r requirements/miner.txt -r requirements/service.txt -r requirements/gpu.txt"
    assert packages.endswith(f"--require-hashes --no-deps {locks}")
    assert project.endswith("--no-deps --no-build-isolation -e .")
    assert (clone.path / "builds").read_text().splitlines() == ["build_gsplat"]  # with the GPU only


@pytest.mark.slow
def test_without_a_built_gsplat_only_the_tiny_profile_goes_on(clone: Clone) -> None:
    clone.write("break-build")
    result = clone.deploy(PATH=with_gpu(clone))
    assert result.returncode != 0
    assert "the compiler failed" in result.stderr
    assert "gsplat, which a GPU needs, is not built" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))
    (clone.path / "builds").unlink()
    assert clone.deploy("--profile", "tiny", PATH=with_gpu(clone)).returncode == 0
    assert not (clone.path / "builds").exists()


def test_a_gpu_needs_python_h(clone: Clone) -> None:
    # An interpreter whose headers are not there.
    (clone.path / ".venv/bin/python").unlink()
    clone.write(
        ".venv/bin/python",
        f'#!/bin/sh\ncase $2 in *sysconfig*) echo /x/python3.12/Python.h ;; *) exec "{sys.executable}" "$@" ;; esac\n',
    )
    (clone.path / ".venv/bin/python").chmod(0o755)
    refused(
        clone.deploy(PATH=with_gpu(clone)), "no /x/python3.12/Python.h", "torch.compile", "apt install python3.12-dev"
    )


def test_the_environment_is_installed_once_for_each_need_and_change(clone: Clone) -> None:
    assert "nstall" not in install(clone.path).stdout
    assert "Installing" in install(clone.path, "dev").stdout
    assert "nstall" not in install(clone.path, "dev").stdout
    clone.write("requirements/miner.txt", "numpy==1\n")
    assert "Installing 1 packages" in install(clone.path, "miner").stdout
    calls = [line for line in (clone.path / "pip-calls").read_text().splitlines() if "install" in line]
    assert [line.removeprefix("--disable-pip-version-check --no-input install ") for line in calls] == [
        step
        for lock in ("dev", "miner")
        for step in (
            "--require-hashes -r requirements/bootstrap.txt",  # brings uv; this one does not
            f"--progress-bar off --require-hashes --no-deps -r requirements/{lock}.txt",
            "--progress-bar off --no-deps --no-build-isolation -e .",
        )
    ]


def test_a_failing_install_says_so(clone: Clone) -> None:
    clone.write("pip.py", "if __name__ == '__main__':\n    raise SystemExit('no route to the index')\n")
    clone.write("constraints.txt", "numpy==1\n")
    result = clone.deploy()
    assert result.returncode != 0
    assert "no route to the index" in result.stderr
    assert "pip could not install" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))


def test_a_registry_that_packs_files_anew_is_named_with_the_way_out(clone: Clone) -> None:
    clone.write("pip.py", "if __name__ == '__main__':\n    raise SystemExit('Hash mismatch for `numpy==1`')\n")
    clone.write("constraints.txt", "numpy==1\n")
    refused(clone.deploy(), "numpy==1 is not the file that the lock names", "scripts/install.sh --no-hashes")
    clone.write("pip.py", PIP)
    unchecked = clone.run("scripts/install.sh", "--no-hashes")
    assert unchecked.returncode == 0
    assert (clone.path / "pip-calls").read_text().endswith("-c constraints.txt -e .[miner,service]\n")
    assert clone.deploy().returncode == 0  # installs nothing again
