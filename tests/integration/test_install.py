"""Installing, upgrading and removing Tunesmith with the real helm and kubectl on a real control plane.

A control plane of its own: the chart's custom resource definitions come and go here.
"""

import json
import time
import uuid
from pathlib import Path

import pytest
import yaml

from devcluster import Cluster, ClusterSpec, CommandFailed, UnsupportedMachine

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts/tunesmith")
SAMPLE = str(ROOT / "manifests/samples/finetunejob.yaml")
SYSTEM = "tunesmith-system"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:tunesmith-operator"
CRDS = ("finetunejobs.tunesmith.dev", "modeldeployments.tunesmith.dev")


@pytest.fixture(scope="module")
def server():
    try:
        started = Cluster.start(ClusterSpec(name="install"))
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    with started:
        yield started


@pytest.fixture
def home(server):
    """The server with a namespace for the operator that enforces restricted Pod Security, and nothing installed."""
    create_namespace(server, SYSTEM)
    yield server
    server.helm("uninstall", "tunesmith", "-n", SYSTEM, "--wait", "--ignore-not-found")
    server.kubectl("delete", "crd", *CRDS, "--ignore-not-found")


@pytest.fixture
def ml(server):
    """A user's namespace."""
    name = f"ml-{uuid.uuid4().hex[:6]}"
    create_namespace(server, name)
    yield name
    server.kubectl("delete", "namespace", name, "--wait=false")


def create_namespace(server, name):
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    server.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))


def install(server, *arguments):
    return server.helm("upgrade", "--install", "tunesmith", CHART, "-n", SYSTEM, *arguments)


def wait_for_crds(server):
    for crd in CRDS:
        server.kubectl("wait", "--for=condition=Established", f"crd/{crd}", "--timeout=30s")


def get(server, *arguments):
    return json.loads(server.kubectl("get", *arguments, "-o", "json"))


def eventually(check, seconds=30.0):
    """The first true answer of `check`, or its last one."""
    end = time.monotonic() + seconds
    while not (answer := check()) and time.monotonic() < end:
        time.sleep(0.2)
    return answer


def state(server):
    """uid, generation and content of what is installed, without what others write to it."""
    found = {}
    for kinds, where in (("crd,clusterrole,clusterrolebinding", []), ("sa,deployment,networkpolicy", ["-n", SYSTEM])):
        for item in get(server, kinds, "-l", "app.kubernetes.io/name=tunesmith", *where)["items"]:
            metadata = item["metadata"]
            content = {field: value for field, value in item.items() if field not in ("metadata", "status")}
            found[item["kind"], metadata["name"]] = (metadata["uid"], metadata.get("generation"), content)
    for crd in CRDS:
        metadata = get(server, "crd", crd)["metadata"]
        found["crd", crd] = (metadata["uid"], metadata["generation"])
    return found


def allowed(server, verb, resource, *, namespace="default", user=ACCOUNT):
    resource, _, part = resource.partition("/")
    subresource = [f"--subresource={part}"] if part else []
    answer = server.kubectl("auth", "can-i", verb, resource, *subresource, "-n", namespace, "--as", user, check=False)
    return answer.strip() == "yes"


def test_helm_install_makes_a_pod_under_restricted_pod_security(home):
    said = install(home)
    assert "kubectl apply -f manifests/samples/finetunejob.yaml" in said, "the notes must say what to do next"
    wait_for_crds(home)
    pods = eventually(lambda: len(found := get(home, "pods", "-n", SYSTEM)["items"]) == 2 and found)
    assert pods, home.kubectl("get", "events", "-n", SYSTEM)
    (container,) = pods[0]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pods[0]["spec"]["serviceAccountName"] == "tunesmith-operator"


def test_a_second_install_changes_nothing(home):
    install(home)
    wait_for_crds(home)
    before = state(home)
    assert len(before) >= 9
    install(home)
    assert state(home) == before


def test_a_dry_run_on_the_server_finds_nothing_wrong(home):
    rendered = home.helm("template", "tunesmith", CHART, "-n", SYSTEM, "--set", "watchNamespaces={default}")
    said = home.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=rendered)
    assert said.count("created (server dry run)") == len([o for o in yaml.safe_load_all(rendered) if o])


def test_kubectl_apply_k_does_the_same_and_again_nothing(home):
    manifests = str(ROOT / "manifests")
    home.kubectl("apply", "-k", manifests)
    wait_for_crds(home)
    assert eventually(lambda: get(home, "pods", "-n", SYSTEM)["items"])
    again = home.kubectl("apply", "-k", manifests).splitlines()
    assert len(again) >= 10
    # of a PodDisruptionBudget kubectl always sends the selector, whatever is there
    changed = [line for line in again if not line.endswith(" unchanged")]
    assert changed in ([], ["poddisruptionbudget.policy/tunesmith-operator configured"])
    home.kubectl("delete", "-k", manifests)


def test_custom_resources_survive_upgrade_uninstall_and_a_new_install(home, ml):
    install(home)
    wait_for_crds(home)
    home.kubectl("apply", "-n", ml, "-f", SAMPLE)
    uid = get(home, "ftj", "sentiment", "-n", ml)["metadata"]["uid"]

    install(home, "--set", "logLevel=DEBUG")
    assert get(home, "ftj", "sentiment", "-n", ml)["metadata"]["uid"] == uid
    (container,) = get(home, "deployment", "tunesmith-operator", "-n", SYSTEM)["spec"]["template"]["spec"]["containers"]
    assert {"name": "TUNESMITH_LOG_LEVEL", "value": "DEBUG"} in container["env"]

    # whoever turns the chart's definitions off goes on with those that are there
    install(home, "--set", "crds.enabled=false")
    assert get(home, "ftj", "sentiment", "-n", ml)["metadata"]["uid"] == uid

    install(home)
    home.helm("uninstall", "tunesmith", "-n", SYSTEM, "--wait")
    assert not get(home, "deployment", "-n", SYSTEM)["items"]
    assert get(home, "ftj", "sentiment", "-n", ml)["metadata"]["uid"] == uid

    install(home)
    assert get(home, "ftj", "sentiment", "-n", ml)["metadata"]["uid"] == uid


def test_without_keep_uninstalling_removes_the_definitions(home):
    install(home, "--set", "crds.keep=false")
    wait_for_crds(home)
    home.helm("uninstall", "tunesmith", "-n", SYSTEM, "--wait")
    assert eventually(lambda: not get(home, "crd")["items"])
    with pytest.raises(CommandFailed, match="doesn't have a resource type"):
        home.kubectl("get", "ftj")


def test_the_operator_may_do_what_it_must_and_no_more(home):
    install(home)
    wait_for_crds(home)
    for verb, resource in (
        ("list", "finetunejobs.tunesmith.dev"),
        ("watch", "modeldeployments.tunesmith.dev"),
        ("patch", "finetunejobs.tunesmith.dev/status"),
        ("create", "secrets"),
        ("delete", "jobs.batch"),
        ("create", "events.events.k8s.io"),
    ):
        assert allowed(home, verb, resource), f"{verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("list", "secrets"),
        ("patch", "secrets"),
        ("patch", "finetunejobs.tunesmith.dev"),
        ("delete", "modeldeployments.tunesmith.dev"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("delete", "namespaces"),
        ("create", "leases.coordination.k8s.io"),
        ("create", "serviceaccounts/token"),
        ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ):
        assert not allowed(home, verb, resource), f"{verb} {resource}"


TEMPLATE = {
    "automountServiceAccountToken": False,
    "restartPolicy": "Never",
    "containers": [{"name": "x", "image": "x", "securityContext": {"allowPrivilegeEscalation": False}}],
    "volumes": [{"name": "plan", "configMap": {"name": "plan"}}, {"name": "scratch", "emptyDir": {}}],
}
OWNED = [{"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "name": "a", "uid": "u", "controller": True}]


def child(kind, api_version, owners=OWNED, **fields):
    account = {"kubernetes.io/service-account.name": "default"}
    metadata = {"name": "stolen", "namespace": "default", "ownerReferences": owners, "annotations": account}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def job_of(**pod):
    return child("Job", "batch/v1", spec={"template": {"spec": TEMPLATE | pod}})


def test_who_has_the_operators_token_may_write_no_more_than_the_operator_does(home):
    """Its rights alone would let it run any pod as any ServiceAccount: the API server's admission policy doesn't."""
    install(home)

    def said(body, *command):
        """What the API server says when the operator's account creates it, or does something else with it."""
        command = command or ("create", "--dry-run=server")
        try:
            return home.kubectl(*command, "-f", "-", "--as", ACCOUNT, stdin=json.dumps(body))
        except CommandFailed as refused:
            return str(refused)

    assert eventually(lambda: "no Kubernetes token" in said(job_of(automountServiceAccountToken=True)))
    assert "created" in said(job_of())
    for body, complaint in (
        (job_of(serviceAccountName="admin"), "no Kubernetes token"),
        (job_of(volumes=[{"name": "node", "hostPath": {"path": "/"}}]), "mount ConfigMaps"),
        (job_of(volumes=[{"name": "all", "secret": {"secretName": "x"}}]), "mount ConfigMaps"),
        (job_of(hostNetwork=True), "no rights on the node"),
        (job_of(initContainers=[{"name": "first", "image": "x"}]), "no rights on the node"),
        (child("Job", "batch/v1", [], spec={"template": {"spec": TEMPLATE}}), "belongs to a FineTuneJob"),
        (child("ConfigMap", "v1", []), "belongs to a FineTuneJob"),
        (child("Secret", "v1", type="kubernetes.io/service-account-token"), "no tokens of ServiceAccounts"),
    ):
        assert complaint in said(body), body
    home.kubectl("create", "configmap", "theirs", "--from-literal=a=b")
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": "default"}}
    stolen = theirs | {"metadata": theirs["metadata"] | {"ownerReferences": OWNED}}
    assert "belongs to a FineTuneJob" in said(stolen, "apply", "--server-side", "--dry-run=server")
    assert "belongs to a FineTuneJob" in said(theirs, "delete", "--dry-run=server")
    home.kubectl("delete", "configmap", "theirs")
    assert "created" in home.kubectl(
        "create", "--dry-run=server", "-f", "-", stdin=json.dumps(child("ConfigMap", "v1", []))
    )


def test_the_operator_may_renew_its_own_lease_and_no_other(home):
    install(home)
    leases = "leases.coordination.k8s.io"
    assert allowed(home, "create", leases, namespace=SYSTEM)
    for name, answer in (("tunesmith-operator", "yes"), ("another", "no")):
        said = home.kubectl("auth", "can-i", "update", f"{leases}/{name}", "-n", SYSTEM, "--as", ACCOUNT, check=False)
        assert said.strip() == answer, name


def test_a_list_of_namespaces_ends_the_rights_elsewhere(home, ml):
    install(home, "--set", f"watchNamespaces={{{ml}}}")
    wait_for_crds(home)
    assert eventually(lambda: allowed(home, "create", "secrets", namespace=ml))
    assert allowed(home, "list", "finetunejobs.tunesmith.dev", namespace=ml)
    for namespace in ("default", SYSTEM):
        assert not allowed(home, "create", "secrets", namespace=namespace)
        assert not allowed(home, "list", "finetunejobs.tunesmith.dev", namespace=namespace)


def test_people_with_the_usual_roles_can_use_it(home, ml):
    install(home)
    wait_for_crds(home)
    for role in ("view", "edit"):
        home.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", "-n", ml)
    assert eventually(lambda: allowed(home, "create", "finetunejobs.tunesmith.dev", user="editer", namespace=ml))
    assert allowed(home, "patch", "modeldeployments.tunesmith.dev/scale", user="editer", namespace=ml)
    assert not allowed(home, "patch", "finetunejobs.tunesmith.dev/status", user="editer", namespace=ml)
    assert eventually(lambda: allowed(home, "list", "finetunejobs.tunesmith.dev", user="viewer", namespace=ml))
    assert not allowed(home, "create", "finetunejobs.tunesmith.dev", user="viewer", namespace=ml)
    assert not allowed(home, "list", "finetunejobs.tunesmith.dev", namespace="default", user="viewer")
    home.kubectl("apply", "-n", ml, "-f", SAMPLE, "--as", "editer")


def test_two_releases_in_one_cluster_are_refused_with_the_owner_named(home, ml):
    install(home)
    wait_for_crds(home)
    with pytest.raises(CommandFailed, match="invalid ownership metadata"):
        home.helm("install", "second", CHART, "-n", ml)
