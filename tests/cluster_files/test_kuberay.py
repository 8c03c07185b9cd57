"""The Kubernetes manifests: KubeRay's own definitions and Kubernetes' own schemas know every field; what a pod may do; what it gets."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.cluster_files.autoscaler import ACCELERATOR, CLUSTER, MARKET, ROOT

DEFINITIONS = ROOT.parent / "shared" / "schemas" / "kuberay"
CLUSTER_FILE, JOB_FILE = CLUSTER / "kuberay" / "raycluster.yaml", CLUSTER / "kuberay" / "rayjob.yaml"
MANIFESTS = [*sorted((CLUSTER / "kuberay").glob("*.yaml")), CLUSTER / "mlflow" / "kubernetes.yaml"]
KUBERNETES = "1.34"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def the(path: Path) -> dict[str, Any]:
    (document,) = documents(path)
    return document


def closed(schema: Any) -> Any:
    """The schema of a custom resource as a server applies it to a new object: unknown fields are refused, some numbers may be text."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    fields = schema.get("properties")
    result = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if fields is not None:
        result["properties"] = {name: closed(value) for name, value in fields.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


@functools.cache
def custom_schema(kind: str) -> Any:
    path = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's definitions are not beside this checkout ({path})")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    whole = closed(schema)
    whole["properties"]["metadata"] = {"type": "object"}  # known to the server, not to the definition
    return whole


def problems(document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(custom_schema(document["kind"])).iter_errors(document)]


@pytest.mark.parametrize("path", [CLUSTER_FILE, JOB_FILE], ids=lambda path: path.name)
def test_kuberay_knows_every_field(path: Path) -> None:
    document = the(path)
    assert problems(document) == []
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    (problem,) = problems(document)
    assert "imag" in problem


def test_the_job_brings_the_same_cluster() -> None:
    assert the(JOB_FILE)["spec"]["rayClusterSpec"] == the(CLUSTER_FILE)["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    others = ("ray.io/", "monitoring.coreos.com/")
    own = [document for document in documents(path) if not document["apiVersion"].startswith(others)]
    for document in own:
        validator.validate(document, KUBERNETES, strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate(document | {"speck": {}}, KUBERNETES, strict=True)
    assert own or path in (CLUSTER_FILE, JOB_FILE)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_client_reads_it(path: Path, tmp_path: Path) -> None:
    """Its parser is not Python's: anchors and merged mappings come out as they were meant."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    text = path.read_text().replace("generateName:", "name:")  # kustomize itself wants a name
    (tmp_path / path.name).write_text(text)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{path.name}]\n")
    done = subprocess.run([kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    assert by_name(done.stdout) == by_name(text)


def by_name(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of everything that runs."""
    cluster, job = the(CLUSTER_FILE)["spec"], the(JOB_FILE)["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    yield "submitter", job["submitterPodTemplate"]["spec"]
    for document in documents(CLUSTER / "mlflow" / "kubernetes.yaml"):
        if "template" in document["spec"]:
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


PODS = dict(pods())


@pytest.mark.parametrize("name", PODS)
def test_every_pod_meets_what_its_namespace_enforces(name: str) -> None:
    """Kubernetes' *restricted* standard, by its list."""
    (namespace,) = [one for one in documents(CLUSTER / "kuberay" / "namespace.yaml") if one["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = PODS[name]
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["seccompProfile"]["type"]) == (True, "RuntimeDefault")
    assert context["runAsUser"] > 0
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(set(volume) - {"name"} <= {"persistentVolumeClaim", "emptyDir", "configMap"} for volume in pod.get("volumes", []))


@pytest.mark.parametrize("name", PODS)
def test_only_the_head_may_ask_kubernetes_for_anything(name: str) -> None:
    assert PODS[name]["automountServiceAccountToken"] is (name == "head")


def test_the_autoscaler_is_the_second_one_and_asks_for_a_token() -> None:
    spec = the(CLUSTER_FILE)["spec"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {group["template"]["spec"]["restartPolicy"] for group in groups} == {"Never"}  # a pod that ended is a node that is gone
    assert spec["autoscalerOptions"]["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_ray_of_the_manifest_is_the_ray_of_the_image() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert the(CLUSTER_FILE)["spec"]["rayVersion"] == pins["ray"]


def test_every_node_mounts_the_storage_root() -> None:
    (claim,) = [one for one in documents(CLUSTER / "kuberay" / "namespace.yaml") if one["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in PODS.keys() - {"submitter", "mlflow", "postgres"}:
        mounts = {mount["name"]: mount["mountPath"] for mount in PODS[name]["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in PODS[name]["volumes"]}
        assert mounts == {"storage": "/mnt/shared", "scratch": "/mnt/scratch", "shm": "/dev/shm"}
        assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert "--storage /mnt/shared/" in the(JOB_FILE)["spec"]["entrypoint"]


def test_the_submitters_shell_leaves_the_whole_command_to_the_cluster() -> None:
    assert not set(the(JOB_FILE)["spec"]["entrypoint"]) & set("&|;<>()$`\\\"'\n")


def test_spot_nodes_take_gpu_pods_and_no_others() -> None:
    for group in the(CLUSTER_FILE)["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
        if group["labels"][MARKET] == "spot":
            assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
            assert group["labels"][ACCELERATOR] in pod["nodeSelector"]["nvidia.com/gpu.product"]
            limits = pod["containers"][0]["resources"]["limits"]
            assert limits == pod["containers"][0]["resources"]["requests"]
        else:
            assert tolerated == set()
            assert keeps_off_spot(pod)
    assert keeps_off_spot(PODS["head"])


def keeps_off_spot(pod: dict[str, Any]) -> bool:
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    rules = [rule for term in terms for rule in term["matchExpressions"]]
    return len(terms) == 1 and len(rules) >= 4 and all(rule["operator"] == "NotIn" for rule in rules)


def test_a_job_ends_in_time_and_takes_its_cluster_away() -> None:
    spec = the(JOB_FILE)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["preRunningDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0  # a sweep goes on where it was
