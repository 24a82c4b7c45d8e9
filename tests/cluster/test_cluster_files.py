"""The files of `cluster/`, as far as they can be checked without a cloud: against Ray's own readers, and each other."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymoe.object_store.urls import is_url
from raymoe.runtime.ray_metrics import METRICS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = ("raycluster.yaml", "rayjob.yaml")


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> dict[str, Any]:
    """The specs of the pods, by the name of their container."""
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return {pod["containers"][0]["name"]: pod for pod in (group["template"]["spec"] for group in groups)}


def image_version() -> str:
    (version,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py3\d+$", dockerfile(), re.MULTILINE)
    return str(version)


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_image_is_pinned_as_ci_is() -> None:
    pins = dict(re.findall(r"([A-Za-z_0-9]+)(?:\[\w+\])?==([\d.]+)", dockerfile()))
    assert {"torch", "ray", "transformers", "s3fs"} <= pins.keys()
    assert pins == {name: constraints()[name.lower()] for name in pins}
    assert image_version() == constraints()["ray"]


def test_the_image_has_what_it_is_built_of() -> None:
    sources = [word for line in re.findall(r"^COPY \S+ (.*) \S+$", dockerfile(), re.MULTILINE) for word in line.split()]
    assert {"raymoe", "pyproject.toml", "constraints.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_all_name_one_image() -> None:
    images = {load("aws.yaml")["docker"]["image"]}
    images |= {container["image"] for name in KUBERAY for pod in pods(name).values() for container in pod["containers"]}
    assert len(images) == 1 and f"-t {images.pop()} " in dockerfile()


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    """aws.yaml as Ray's launcher completes it, after its own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(load("aws.yaml"))
    validate_config(prepared)
    return prepared


def test_the_launcher_takes_it(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    head, gpu = types["head"], types["gpu"]
    assert aws["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    assert (gpu["min_workers"], gpu["resources"]["GPU"]) == (0, 1)
    assert 0 < gpu["max_workers"] <= aws["max_workers"]
    assert aws["idle_timeout_minutes"] > 0
    assert "instance-profile" in gpu["node_config"]["IamInstanceProfile"]["Arn"]


def test_the_launcher_installs_nothing(aws: dict[str, Any]) -> None:
    """Ray's defaults would install a nightly Ray where they find none."""
    assert [aws[f"{kind}setup_commands"] for kind in ("", "head_", "worker_")] == [[], [], []]


def test_the_launcher_refuses_mistakes() -> None:
    """What the checks above are worth."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = load("aws.yaml")
    wrong["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(wrong))


def test_aws_nodes_know_the_token() -> None:
    config = load("aws.yaml")
    options = " ".join(config["docker"]["run_options"])
    (place,) = config["file_mounts"]
    assert "RAY_AUTH_MODE=token" in options and f"RAY_AUTH_TOKEN_PATH={place}" in options
    assert "token" not in yaml.safe_dump(config["file_mounts"]).replace(".ray/auth_token", "")  # a file, not a secret


@pytest.mark.parametrize("name", KUBERAY)
def test_the_autoscaler_of_kuberay_reads_it(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    custom_resource = {"metadata": {"name": "raymoe", "namespace": "x"}, "spec": copy.deepcopy(cluster_spec(name))}
    derived = _derive_autoscaling_config_from_ray_cr(custom_resource)
    types = derived["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0 and "GPU" not in types["headgroup"]["resources"]
    assert types["gpu"]["resources"]["GPU"] == 1 and types["gpu"]["resources"]["CPU"] >= 2
    assert types["gpu"]["min_workers"] < types["gpu"]["max_workers"]
    assert derived["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_are_as_the_operator_expects(name: str) -> None:
    """Fields as KubeRay documents them (ray.io/v1)."""
    content, spec = load(name), cluster_spec(name)
    assert content["apiVersion"] == "ray.io/v1"
    assert content["kind"] == {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[name]
    known = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
    assert spec.keys() == known | {"headGroupSpec", "workerGroupSpecs"}
    assert spec["rayVersion"] == image_version()
    assert spec["enableInTreeAutoscaling"] is True and spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods(name: str) -> None:
    found = pods(name)
    assert list(found) == ["ray-head", "ray-worker"]
    gpus = {who: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for who, pod in found.items()}
    assert gpus == {"ray-head": None, "ray-worker": "1"}
    assert found["ray-worker"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    for pod in found.values():
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert pod["serviceAccountName"] == "raymoe"
        secrets = [env for env in container["env"] if env["name"] == "HF_TOKEN"]
        assert "value" not in secrets[0] and secrets[0]["valueFrom"]["secretKeyRef"]["name"]


def test_the_job_is_a_merge() -> None:
    """Its command line is one that `raymoe merge` takes, and the config that it names is mounted."""
    import typer.main

    from raymoe.cli import app

    spec = load("rayjob.yaml")["spec"]
    program, command, *arguments = spec["entrypoint"].split()
    assert (program, command) == ("raymoe", "merge")
    merge: Any = typer.main.get_command(app)
    given = merge.commands["merge"].make_context("merge", arguments).params
    mounts = {mount["mountPath"] for mount in pods("rayjob.yaml")["ray-head"]["containers"][0]["volumeMounts"]}
    assert str(given["config"].parent) in mounts and is_url(given["output"]) and is_url(given["result"])
    assert "entrypointNumCpus" not in spec  # or the driver would be put on a GPU worker
    assert spec["shutdownAfterJobFinishes"] is True and spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0
    assert spec["submissionMode"] == "HTTPMode" and spec["ttlSecondsAfterFinished"] >= 0


def test_the_dashboard_shows_what_is_recorded() -> None:
    """All metrics are shown, under the names that Ray exports: counters end with _total."""
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    exported = {f"ray_{name}{'_total' if kind == 'Counter' else ''}" for name, (kind, _, _) in METRICS.items()}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"ray_raymoe_\w+", " ".join(queries))) == exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"]))) == variables


def test_the_readme_names_each_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    assert [path.name for path in CLUSTER.iterdir() if path.name != "README.md" and path.name not in text] == []
