"""What both cluster files for machines in a cloud promise: how they are reached and what is mounted."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_files.autoscaler import VM_FILES, read


@pytest.fixture(params=VM_FILES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def test_nothing_listens_to_the_internet(config: dict[str, Any]) -> None:
    assert config["provider"]["use_internal_ips"] is True
    assert "use_external_head_ip" not in config["provider"]
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert config["auth"]["ssh_proxy_use_node_id"] is True


def test_every_node_wants_the_token(config: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_every_node_has_the_storage_root_and_a_scratch_disk(config: dict[str, Any]) -> None:
    for folder in ("/mnt/shared", "/mnt/scratch"):
        assert any(re.search(rf"mount -[to] [^;]*{folder}", command) for command in config["initialization_commands"])
        assert f"-v {folder}:{folder}" in config["docker"]["run_options"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "--object-spilling-directory=/mnt/scratch/" in commands[-1]


def test_nodes_run_the_image_and_install_nothing(config: dict[str, Any]) -> None:
    """What these are left out for, Ray fills in with an installation of another Ray."""
    assert [config[f"{kind}setup_commands"] for kind in ("", "head_", "worker_")] == [[], [], []]


# The commands that prepare a machine run for real in bash; the programs that would change one only note what they were asked


def scratch(config: dict[str, Any]) -> str:
    (command,) = [command for command in config["initialization_commands"] if "mkfs" in command]
    return command


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """Runs a command where `sudo` notes what it would do; returns the notes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    notes = tmp_path / "notes"

    def run(command: str, *, disks: dict[str, str], mounted: bool = False) -> list[str]:
        """``disks``: a disk of the machine's own → its file system, "" for none."""
        links = tmp_path / "by-id"
        links.mkdir(exist_ok=True)
        for disk in disks:
            (links / f"google-local-nvme-ssd-{disk}").touch()
        listed = "\n".join([*(f"/dev/{disk} Amazon EC2 NVMe Instance Storage" for disk in disks), "/dev/root Amazon Elastic Block Store"])
        cases = "\n".join(f'*{disk}) echo "{system}" ;;' for disk, system in disks.items())
        lsblk = f'#!/bin/bash\nif [ "$1" = -dpno ]; then echo "{listed}"; exit; fi\ncase "${{@: -1}}" in {cases}\n*) echo ext4 / ;; esac\n'
        write(programs / "lsblk", lsblk)
        write(programs / "mountpoint", f"#!/bin/bash\nexit {0 if mounted else 1}\n")
        write(programs / "sudo", f'#!/bin/bash\necho "$@" >> {notes}\n')
        notes.write_text("")
        local = command.replace("/dev/disk/by-id", str(links))
        environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", f"({local})"], check=True, env=environment, capture_output=True)
        return [line.replace(f"{links}/google-local-nvme-ssd-", "/dev/") for line in notes.read_text().splitlines()]

    return run


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def formatted(notes: list[str]) -> list[str]:
    return [line.split()[-1] for line in notes if line.startswith("mkfs")]


def test_several_disks_become_one(config: dict[str, Any], machine: Any) -> None:
    notes = machine(scratch(config), disks={"nvme1n1": "", "nvme2n1": ""})
    (array,) = [line for line in notes if line.startswith("mdadm")]
    assert array.split()[-3:] == ["--raid-devices=2", "/dev/nvme1n1", "/dev/nvme2n1"]
    assert formatted(notes) == ["/dev/md0"]
    assert "mount -o noatime /dev/md0 /mnt/scratch" in notes


def test_one_disk_is_taken_as_it_is(config: dict[str, Any], machine: Any) -> None:
    notes = machine(scratch(config), disks={"nvme1n1": ""})
    assert formatted(notes) == ["/dev/nvme1n1"]
    assert not any("mdadm" in line for line in notes)


def test_a_disk_that_holds_anything_is_left_alone(config: dict[str, Any], machine: Any) -> None:
    assert formatted(machine(scratch(config), disks={"nvme1n1": "LVM2_member", "nvme2n1": ""})) == ["/dev/nvme2n1"]
    assert formatted(machine(scratch(config), disks={"nvme1n1": "ext4 /data"})) == []


def test_a_machine_without_disks_of_its_own_uses_its_root_disk(config: dict[str, Any], machine: Any) -> None:
    notes = machine(scratch(config), disks={})
    assert formatted(notes) == []
    assert notes[-1] == "chmod 1777 /mnt/scratch"


def test_what_is_mounted_already_is_not_touched_again(config: dict[str, Any], machine: Any) -> None:
    """`ray up` runs these again on a head that is there."""
    assert formatted(machine(scratch(config), disks={"nvme1n1": ""}, mounted=True)) == []
    (shared,) = [command for command in config["initialization_commands"] if "nfs4" in command]
    first, again = (machine(shared, disks={}, mounted=mounted) for mounted in (False, True))
    assert next(line for line in first if line.startswith("mount ")).split()[-1] == "/mnt/shared"
    assert not any(line.startswith("mount ") for line in again)
