"""The Helm chart: closed values, what each value renders, and the same objects as the kustomize base."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from devcluster import UnsupportedMachine, binaries, progress
from tunesmith_api import __version__, keys
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_operator.shell.environment import config_from

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/tunesmith"
NAMESPACE = "tunesmith-system"
OPERATOR = "tunesmith-operator"


class Programs:
    """helm and kubectl as the cluster tests use them, with no configuration of the user's own."""

    def __init__(self, found, home):
        self._found = found
        kinds = ("CACHE", "CONFIG", "DATA")
        self._environment = os.environ | {f"HELM_{kind}_HOME": str(home / kind) for kind in kinds}

    def run(self, program, *arguments):
        argv = [self._found.path(program), *map(str, arguments)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=self._environment)

    def render(self, *arguments, namespace=NAMESPACE):
        done = self.run("helm", "template", "tunesmith", CHART, "--namespace", namespace, *arguments)
        assert done.returncode == 0, done.stderr
        return objects(done.stdout)

    def refuse(self, *arguments):
        done = self.run("helm", "template", "tunesmith", CHART, *arguments)
        assert done.returncode != 0
        return done.stderr


def objects(text):
    found = [document for document in parsed(text) if document]
    named = {(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]): o for o in found}
    assert len(named) == len(found), "two objects of one name"
    return named


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    try:
        found = binaries.ensure(progress.to_stderr())
    except UnsupportedMachine as reason:
        pytest.skip(f"no helm and kubectl: this machine {reason}")
    return Programs(found, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def default(programs):
    return programs.render()


def deployment(rendered):
    (found,) = [o for (kind, _, _), o in rendered.items() if kind == "Deployment"]
    return found


def environment(rendered):
    (container,) = deployment(rendered)["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry.get("value") for entry in container["env"]}


def test_lint_finds_nothing_to_say(programs):
    done = programs.run("helm", "lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


# --- values ---


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        pytest.param("replica=2", "additional properties 'replica' not allowed", id="unknown value"),
        pytest.param("image.name=x", "at '/image': additional properties 'name' not allowed", id="unknown inner value"),
        pytest.param("crds.install=true", "at '/crds': additional properties 'install' not allowed", id="a guess"),
        pytest.param("logLevel=LOUD", "at '/logLevel': value must be one of 'DEBUG'", id="no such level"),
        pytest.param("logFormat=xml", "at '/logFormat': value must be one of 'json', 'text'", id="no such format"),
        pytest.param("pollIntervalSeconds=3s", "at '/pollIntervalSeconds': got string, want integer", id="wrong type"),
        pytest.param("pollIntervalSeconds=0", "at '/pollIntervalSeconds': minimum: got 0, want 1", id="too small"),
        pytest.param("apiRequests.qps=0", "at '/apiRequests/qps': minimum: got 0, want 1", id="no requests"),
        pytest.param("apiRequests.rate=9", "at '/apiRequests': additional properties 'rate' not allowed", id="no rate"),
        pytest.param("serverImage.repository=a:b@c", "at '/serverImage/repository'", id="a tag in the server's name"),
        pytest.param("watchNamespaces=ml", "at '/watchNamespaces': got string, want array", id="no list"),
        pytest.param("crds.keep=yes", "at '/crds/keep': got string, want boolean", id="no boolean"),
        pytest.param("image.digest=sha256:12", "at '/image/digest': 'sha256:12' does not match", id="short digest"),
        pytest.param("image.repository=host/name:tag@x", "at '/image/repository'", id="a tag in the repository"),
        pytest.param("resources.limits.memory=lots", "at '/resources/limits/memory'", id="no quantity"),
        pytest.param(
            "tolerations[0].keys=x", "additional properties 'keys' not allowed", id="unknown toleration field"
        ),
        pytest.param("serviceAccount.create=false", "serviceAccount.name is needed", id="no account at all"),
        pytest.param(
            r"podLabels.app\.kubernetes\.io/name=x",
            "at '/podLabels/app.kubernetes.io~1name': false schema",
            id="a label that selects the pod",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(programs, setting, complaint):
    assert complaint in programs.refuse("--set", setting)


def test_schema_and_values_name_the_same_values_and_no_object_is_open():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema["properties"].pop("global")  # helm's own

    def compare(node, value, path):
        assert node.get("description") or path == "values", path
        if "properties" in node:
            assert node["additionalProperties"] is False or path == "values.podLabels", path
            if isinstance(value, dict):
                assert node["properties"].keys() >= value.keys(), path
                for name, child in node["properties"].items() if path != "values.podLabels" else ():
                    compare(child, value.get(name), f"{path}.{name}")
        elif node.get("type") == "object":
            assert node["additionalProperties"]["type"], path
        elif node.get("type") == "array" and "properties" in node["items"]:
            assert node["items"]["additionalProperties"] is False, path

    compare(schema, values, "values")
    assert schema["properties"].keys() == values.keys()


def test_every_value_has_a_comment():
    lines = (CHART / "values.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s*[A-Za-z]+:", line) or re.match(r"\s*(requests|limits|cpu|memory):", line):
            continue
        above = lines[number - 1].strip()
        section = bool(re.match(r"[A-Za-z]+:$", line)) and lines[number + 1].strip().startswith("#")
        assert above.startswith("#") or section, f"values.yaml line {number + 1}: {line}"


def test_a_parent_chart_may_set_globals(programs, default):
    assert programs.render("--set", "global.team=ml") == default


# --- what values do ---


def test_a_digest_wins_over_the_tag(programs):
    digest = "sha256:" + "0123456789abcdef" * 4
    rendered = programs.render(
        "--set", f"image.repository=registry:5000/team/operator,image.tag=v2,image.digest={digest}",
        "--set", "trainerImage.repository=registry:5000/team/trainer,trainerImage.tag=v3,trainerImage.pullPolicy=Never",
    )  # fmt: skip
    (container,) = deployment(rendered)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry:5000/team/operator@{digest}"
    assert environment(rendered)["TUNESMITH_TRAINER_IMAGE"] == "registry:5000/team/trainer:v3"
    assert environment(rendered)["TUNESMITH_IMAGE_PULL_POLICY"] == "Never"


def test_images_default_to_the_version_of_the_chart(default):
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    (container,) = deployment(default)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"tunesmith-operator:{version}"
    assert environment(default)["TUNESMITH_TRAINER_IMAGE"] == f"tunesmith-trainer:{version}"


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_documents_install_the_images_that_they_build(programs, page):
    text = (ROOT / page).read_text().replace("\\\n", " ").replace("REGISTRY", "registry:5000/team")
    (line,) = re.findall(r"(?m)^helm (?:install|upgrade --install) (.*)$", text)
    done = programs.run(
        "helm", "template", *(ROOT / word if word.startswith("charts/") else word for word in line.split())
    )
    assert done.returncode == 0, done.stderr
    rendered = objects(done.stdout)
    (container,) = deployment(rendered)["spec"]["template"]["spec"]["containers"]
    images = {container["image"], environment(rendered)["TUNESMITH_TRAINER_IMAGE"]}
    assert images == {f"registry:5000/team/tunesmith-{name}:{__version__}" for name in ("operator", "trainer")}
    built = re.findall(r"(?m)^docker build -f (\S+) -t (\S+) \.$", text)
    assert {image for _, image in built} == (images if page.startswith("docs") else set())
    assert all((ROOT / dockerfile).is_file() for dockerfile, _ in built)


def test_a_list_of_namespaces_replaces_the_rights_everywhere(programs):
    rendered = programs.render("--set", "watchNamespaces={ml,research}")
    bindings = {key: o for key, o in rendered.items() if key[0].endswith("RoleBinding")}
    lease = ("RoleBinding", NAMESPACE, f"{OPERATOR}-lease")
    assert set(bindings) == {lease, ("RoleBinding", "ml", OPERATOR), ("RoleBinding", "research", OPERATOR)}
    for binding in bindings.values():
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": OPERATOR, "namespace": NAMESPACE}]
    assert environment(rendered)["TUNESMITH_NAMESPACES"] == "ml,research"


def test_crds_are_kept_unless_asked_otherwise(programs, default):
    kept = [o["metadata"]["annotations"] for (kind, _, _), o in default.items() if kind == "CustomResourceDefinition"]
    assert kept == [{"helm.sh/resource-policy": "keep"}] * 2
    loose = programs.render("--set", "crds.keep=false")
    crds = [o for (kind, _, _), o in loose.items() if kind == "CustomResourceDefinition"]
    assert len(crds) == 2
    assert not any("annotations" in o["metadata"] for o in crds)
    without = programs.render("--set", "crds.enabled=false")
    assert without.keys() == {key for key in default if key[0] != "CustomResourceDefinition"}


def test_replicas_agree_by_a_lease_that_only_they_may_renew(default):
    assert deployment(default)["spec"]["replicas"] == 2
    name = environment(default)["TUNESMITH_LEASE_NAME"]
    create, renew = default["Role", NAMESPACE, OPERATOR]["rules"]
    assert (create["resources"], create["verbs"]) == (["leases"], ["create"])
    assert (renew["resourceNames"], renew["verbs"]) == ([name], ["get", "update"])
    assert default["PodDisruptionBudget", NAMESPACE, OPERATOR]["spec"]["minAvailable"] == 1


def test_switches_remove_what_they_name_and_nothing_else(programs, default):
    gone = {
        "networkPolicy.enabled=false": {"NetworkPolicy"},
        "admissionPolicy.enabled=false": {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"},
        "rbac.aggregateToUserRoles=false": {"ClusterRole"},
        "rbac.create=false": {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"},
        "replicas=1": {"PodDisruptionBudget"},
        "serviceAccount.create=false,serviceAccount.name=mine": {"ServiceAccount"},
    }
    for setting, kinds in gone.items():
        rendered = programs.render("--set", setting)
        assert {key[0] for key in default.keys() - rendered.keys()} == kinds, setting
        assert not rendered.keys() - default.keys(), setting
    account = programs.render("--set", "serviceAccount.create=false,serviceAccount.name=mine")
    assert deployment(account)["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
    assert account["ClusterRoleBinding", "", OPERATOR]["subjects"][0]["name"] == "mine"


def test_placement_and_metadata_of_the_operator(programs, tmp_path):
    values = {
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "system-cluster-critical",
        "podLabels": {"team": "ml"},
        "podAnnotations": {"prometheus.io/scrape": "true"},
        "serviceAccount": {"annotations": {"role": "tunesmith"}},
        "resources": {"limits": {"cpu": 1, "memory": "1Gi"}},
        "logLevel": "DEBUG",
        "logFormat": "text",
        "pollIntervalSeconds": 7,
        "fullnameOverride": "tuner",
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = programs.render("--values", tmp_path / "values.yaml")
    template = deployment(rendered)["spec"]["template"]
    for field in ("imagePullSecrets", "nodeSelector", "tolerations", "priorityClassName"):
        assert template["spec"][field] == values[field]
    assert template["metadata"]["labels"]["team"] == "ml"
    assert template["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    assert template["spec"]["containers"][0]["resources"]["limits"] == {"cpu": 1, "memory": "1Gi"}
    assert rendered["ServiceAccount", NAMESPACE, "tuner"]["metadata"]["annotations"] == {"role": "tunesmith"}
    found = environment(rendered)
    assert found["TUNESMITH_LOG_LEVEL"] == "DEBUG"
    assert found["TUNESMITH_LOG_FORMAT"] == "text"
    assert found["TUNESMITH_POLL_INTERVAL_SECONDS"] == "7"
    assert "TUNESMITH_NAMESPACES" not in found


class Watched(dict):
    """Remembers which variables were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def test_the_operator_understands_what_the_chart_tells_it(programs):
    settings = "watchNamespaces={ml,research},trainerImage.pullPolicy=Always,pollIntervalSeconds=9,logFormat=text"
    settings += ",heartbeatStaleSeconds=300,retireDelaySeconds=0,workers=8,apiRequests.qps=12,apiRequests.burst=100"
    settings += ",serverImage.repository=registry:5000/server,serverImage.tag=v4"
    settings += ",vllmImage.repository=vllm,vllmGpuImage.repository=vllm,vllmGpuImage.tag=v5-cuda"
    rendered = programs.render("--set", settings)
    told = Watched({name: value or NAMESPACE for name, value in environment(rendered).items()})
    config = config_from(told)
    assert told.keys() <= told.read, "a variable that the operator does not know"
    assert told.read - told.keys() == {"TUNESMITH_HEALTH_PORT", "TUNESMITH_METRICS_PORT"}, "the pod's ports are fixed"
    assert config.trainer_image == told["TUNESMITH_TRAINER_IMAGE"]
    assert config.server_image == "registry:5000/server:v4"
    assert (config.vllm_image, config.vllm_gpu_image) == (f"vllm:{__version__}", "vllm:v5-cuda")
    (container,) = deployment(rendered)["spec"]["template"]["spec"]["containers"]
    assert config.activator_image == container["image"]
    assert (config.heartbeat_stale_seconds, config.retire_delay_seconds) == (300, 0)
    assert (config.workers, config.qps, config.burst) == (8, 12, 100)
    assert (config.namespaces, config.image_pull_policy) == (("ml", "research"), "Always")
    assert (config.poll_interval_seconds, config.log_format, config.log_level) == (9, "text", "INFO")
    assert config.operator_namespace == NAMESPACE
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"health": config.health_port, "metrics": config.metrics_port}


def test_left_alone_the_chart_says_what_the_operator_does_by_itself(default):
    told = {name: value or NAMESPACE for name, value in environment(default).items()}
    names = ("TUNESMITH_TRAINER_IMAGE", "TUNESMITH_ACTIVATOR_IMAGE", "TUNESMITH_OPERATOR_NAMESPACE")
    names += ("TUNESMITH_LEASE_NAME",)
    alone = {name: told[name] for name in names}
    assert config_from(told) == config_from(alone)


def test_a_selector_never_holds_what_a_new_version_changes(default):
    selector = deployment(default)["spec"]["selector"]["matchLabels"]
    assert not {"app.kubernetes.io/version", "helm.sh/chart"} & selector.keys()


# --- rights ---


def rules(role):
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_operator_reads_no_secret_and_has_no_wildcard(default):
    granted = rules(default["ClusterRole", "", OPERATOR])
    assert not [right for right in granted if "*" in right]
    assert {right for right in granted if right[1].startswith("secrets")} == {("", "secrets", "create")}
    assert not [
        right for right in granted if right[1] in ("pods/exec", "nodes", "serviceaccounts", "serviceaccounts/token")
    ]
    assert not [right for right in granted if right[0] == "rbac.authorization.k8s.io"]
    # users' own specs are theirs: the operator writes status only
    changed = {right[2] for right in granted if right[0] == keys.GROUP and "/" not in right[1]}
    assert changed <= {"list", "watch", "delete"}


def test_users_roles_are_extended(default):
    view, edit = (default["ClusterRole", "", f"tunesmith-{role}"] for role in ("view", "edit"))
    aggregate = "rbac.authorization.k8s.io/aggregate-to-"
    assert {label for label in view["metadata"]["labels"] if label.startswith(aggregate)} == {
        f"{aggregate}{role}" for role in ("view", "edit", "admin")
    }
    assert {label for label in edit["metadata"]["labels"] if label.startswith(aggregate)} == {
        f"{aggregate}{role}" for role in ("edit", "admin")
    }
    assert {verb for _, _, verb in rules(view)} == {"get", "list", "watch"}
    assert not {right for right in rules(edit) if right[1].endswith("/status")}
    for plural in (keys.FINETUNEJOB_PLURAL, keys.MODELDEPLOYMENT_PLURAL):
        assert (keys.GROUP, plural, "create") in rules(edit)
        assert (keys.GROUP, plural, "watch") in rules(view)


def test_the_network_policy_leads_to_what_pods_say_of_themselves(default):
    policy = default["NetworkPolicy", NAMESPACE, OPERATOR]
    (progress_rule,) = [rule for rule in policy["spec"]["egress"] if "to" in rule]
    assert progress_rule["ports"] == [{"port": keys.PORT_PROGRESS, "protocol": "TCP"}]
    assert keys.PORT_HEALTH == keys.PORT_PROGRESS
    selector = progress_rule["to"][0]["podSelector"]
    assert selector["matchLabels"] == {keys.LABEL_MANAGED_BY: keys.MANAGED_BY}
    (pods,) = selector["matchExpressions"]
    assert (pods["key"], pods["operator"]) == (keys.LABEL_COMPONENT, "In")
    assert set(pods["values"]) == {keys.COMPONENT_TRAINER, keys.COMPONENT_SERVER, keys.COMPONENT_ACTIVATOR}


# --- the kustomize base ---


def without_helm(o):
    """An object as it would be had helm not made it."""
    metadata = dict(o["metadata"])
    for field, names in (
        ("labels", ("app.kubernetes.io/managed-by", "helm.sh/chart")),
        ("annotations", ("helm.sh/resource-policy",)),
    ):
        left = {name: value for name, value in metadata.pop(field, {}).items() if name not in names}
        if left:
            metadata[field] = left
    return o | {"metadata": metadata}


def test_kustomize_makes_the_same_objects_as_the_chart(programs, default):
    done = programs.run("kubectl", "kustomize", ROOT / "manifests")
    assert done.returncode == 0, done.stderr
    made = objects(done.stdout)
    space = made.pop(("Namespace", "", NAMESPACE))
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert made.keys() == default.keys()
    for key, expected in default.items():
        assert made[key] == without_helm(expected), key
