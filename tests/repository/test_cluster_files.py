"""The files of examples/cluster are what Slurm, Ray's launcher and KubeRay read; test_cluster_page.py runs one."""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "cluster"
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
PINNED = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE).group(1)


def test_the_page_names_every_file():
    for path in FILES.iterdir():
        assert f"(../examples/cluster/{path.name})" in PAGE, path.name


def test_bash_reads_the_slurm_script():
    done = subprocess.run(["bash", "-n", FILES / "slurm.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", FILES / "slurm.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_slurm_hears_all_that_the_script_asks_for():
    """It reads lines before the first command alone."""
    lines = (FILES / "slurm.sh").read_text(encoding="utf-8").splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert asked == [line for line in head if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= {line.split()[1] for line in asked}


@pytest.mark.slow
def test_ray_s_launcher_takes_its_file():
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("ray")
    pytest.importorskip("jsonschema")
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((FILES / "ray-up.yaml").read_text(encoding="utf-8"))
    whole = prepare_config(config)  # as `ray up` does; it knows which fields this kind of provider has none of
    validate_config(whole)
    assert whole["available_node_types"]["local.cluster.node"]["min_workers"] == len(config["provider"]["worker_ips"])
    assert f"'ray[default]=={PINNED}'" in " ".join(config["setup_commands"])
    head, others = (" ".join(config[f"{which}_start_ray_commands"]) for which in ("head", "worker"))
    assert f"--node-ip-address={config['provider']['head_ip']}" in head  # $RAY_HEAD_IP is set for the others alone
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in others


def test_kuberay_s_file_has_a_cluster_and_a_job_on_it():
    yaml = pytest.importorskip("yaml")
    cluster, job = yaml.safe_load_all((FILES / "kuberay.yaml").read_text(encoding="utf-8"))
    assert [(one["apiVersion"], one["kind"]) for one in (cluster, job)] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    assert set(cluster["spec"]) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["spec"]["rayVersion"] == PINNED
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    for group in workers:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    containers = []
    for group in (head, *workers):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            containers.append(container)
            assert container["image"].endswith(f":{PINNED}")
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert any(mount["mountPath"] == "/runs" for mount in containers[0]["volumeMounts"])
    assert all(any(mount["mountPath"] == "/data" for mount in one["volumeMounts"]) for one in containers)
    # As many actors as the workers have cores: each takes one.
    cores = sum(int(group["replicas"]) * int(containers[1]["resources"]["limits"]["cpu"]) for group in workers)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert f"engine.workers={cores} " in job["spec"]["entrypoint"]


def test_the_files_are_for_the_ray_that_is_tested():
    pytest.importorskip("ray")
    assert importlib.metadata.version("ray") == PINNED
