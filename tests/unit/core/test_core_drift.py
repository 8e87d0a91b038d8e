"""Drift: what counts as a difference between a live object and its manifest, and the patch that undoes it."""

import pytest

from support import make
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.kubernetes.drift import correction, fields_of, fingerprint, was_written
from tunesmith_operator.core.kubernetes.objects import ConfigMapView, ServiceView, SpecView
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.modeldeployment.children import server_deployment
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import template_of
from tunesmith_operator.core.text import amount

JOB = FineTuneJob.model_validate(make.finetunejob(workers={"resources": {"cpu": "1000m", "memory": "1024Mi"}}))
CHILDREN = build(JOB, make.CONFIG, 1)
OWNER = ModelDeployment.model_validate(make.modeldeployment(resources={"cpu": "1000m", "memory": "1024Mi"}))
TEMPLATE = template_of(OWNER, SourceModel("s3://models/x", "", OWNER.spec.storage), make.CONFIG)
DEPLOYMENT = server_deployment(TEMPLATE, 1, 1, make.CONFIG)


def live(manifest, view, **changes):
    return view.of(make.merged(manifest.body, changes))


def test_what_is_as_written_needs_no_correction_and_neither_do_defaults_beside_it():
    service = {"spec": {"clusterIP": "None", "type": "ClusterIP", "ipFamilies": ["IPv4"], "sessionAffinity": "None"}}
    assert correction(CHILDREN.service, live(CHILDREN.service, ServiceView, **service)) == {}
    assert correction(CHILDREN.network_policy, live(CHILDREN.network_policy, SpecView)) == {}
    assert correction(CHILDREN.config_map, live(CHILDREN.config_map, ConfigMapView)) == {}
    assert correction(CHILDREN.job, live(CHILDREN.job, JobView, spec={"template": {"spec": {"dnsPolicy": "x"}}})) == {}
    assert (
        correction(DEPLOYMENT, live(DEPLOYMENT, DeploymentView, spec={"template": {"spec": {"dnsPolicy": "x"}}})) == {}
    )


def container(**changes):
    (one,) = DEPLOYMENT.body["spec"]["template"]["spec"]["containers"]
    return {"spec": {"template": {"spec": {"containers": [make.merged(one, changes)]}}}}


def test_amounts_are_compared_by_their_value():
    same = {"cpu": "1", "memory": "1Gi"}
    assert correction(DEPLOYMENT, live(DEPLOYMENT, DeploymentView, **container(resources={"limits": same}))) == {}
    more = {"cpu": "2", "memory": "1Gi"}
    assert correction(DEPLOYMENT, live(DEPLOYMENT, DeploymentView, **container(resources={"limits": more})))
    gpu = {"nvidia.com/gpu": "1"}
    assert correction(DEPLOYMENT, live(DEPLOYMENT, DeploymentView, **container(resources={"limits": gpu})))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1000m", "1", True), ("0.5", "500m", True), ("1024Mi", "1Gi", True), ("1e3", "1k", True), (2, "2", True), ("1000000n", "1m", True),
        ("1", "2", False), ("1G", "1Gi", False), ("1", None, False),
    ],
)  # fmt: skip
def test_quantities_have_a_value(one, other, same):
    assert (amount(one) == amount(other)) is same


def test_a_list_is_ours_as_a_whole_and_is_written_as_a_whole():
    ports = CHILDREN.service.body["spec"]["ports"]
    more = {"spec": {"ports": [*ports, {"name": "ssh", "port": 22}]}}
    assert correction(CHILDREN.service, live(CHILDREN.service, ServiceView, **more)) == {"spec": {"ports": ports}}


def test_a_selector_with_one_more_entry_selects_something_else():
    more = {"spec": {"selector": {"app": "mine"}}}
    assert correction(CHILDREN.service, live(CHILDREN.service, ServiceView, **more)) == {
        "spec": {"selector": {"app": None}}
    }


def test_a_volume_that_is_no_longer_empty_is_a_difference():
    volumes = [
        {"name": it["name"], "hostPath": {"path": "/"}} if "emptyDir" in it else it
        for it in DEPLOYMENT.body["spec"]["template"]["spec"]["volumes"]
    ]
    changed = live(DEPLOYMENT, DeploymentView, spec={"template": {"spec": {"volumes": volumes}}})
    assert fields_of(correction(DEPLOYMENT, changed)) == "spec.template"


def test_an_empty_value_that_the_api_server_leaves_out_is_none():
    (one,) = DEPLOYMENT.body["spec"]["template"]["spec"]["containers"]
    entries = [{name: value for name, value in it.items() if value != ""} for it in one["env"]]
    assert correction(DEPLOYMENT, live(DEPLOYMENT, DeploymentView, **container(env=entries))) == {}


def test_another_manifest_is_written_with_its_labels_and_hash():
    older = {"metadata": {"annotations": {"tunesmith.dev/spec-hash": "older"}}}
    patch = correction(CHILDREN.service, live(CHILDREN.service, ServiceView, **older))
    assert patch["metadata"]["annotations"] == {"tunesmith.dev/spec-hash": CHILDREN.service.hash}
    assert correction(CHILDREN.job, live(CHILDREN.job, JobView, **older)) == {}, "of a Job the most can't be changed"


def test_of_a_job_only_what_can_be_changed_is_compared():
    changed = live(CHILDREN.job, JobView, spec={"parallelism": 0, "activeDeadlineSeconds": 5, "completions": 9})
    assert correction(CHILDREN.job, changed) == {"spec": {"parallelism": 2, "activeDeadlineSeconds": None}}


def test_a_plan_is_kept_as_a_digest_and_written_in_full():
    changed = live(CHILDREN.config_map, ConfigMapView, data={"plan.json": "{}", "note": "mine"})
    assert len(changed.content) < 100
    assert changed.data == {}, "its data is needed for nothing but a history of revisions"
    assert correction(CHILDREN.config_map, changed) == {"data": CHILDREN.config_map.body["data"]}


def test_an_answer_is_known_again_until_it_changes():
    answer = live(CHILDREN.service, ServiceView, spec={"selector": {"app": "mine"}})
    known = fingerprint(CHILDREN.service, answer)
    again = live(CHILDREN.service, ServiceView, spec={"selector": {"app": "mine"}})
    other = live(CHILDREN.service, ServiceView, spec={"selector": {"app": "yours"}})
    assert fingerprint(CHILDREN.service, again) == known != fingerprint(CHILDREN.service, other)


@pytest.mark.parametrize(
    ("difference", "written", "same"),
    [
        ({"spec": {"a": 1}}, {"spec": {"a": 2, "b": 3}}, True),
        ({"spec": {"a": 1}}, {"spec": {"b": 3}}, False),
        ({"spec": {"a": {"x": None}}}, {"spec": {"a": {"y": 1}}}, False),
        ({"spec": {"a": [1]}}, {"spec": {"a": [2]}}, True),
        ({"metadata": {"labels": {}}}, {"spec": {}}, False),
    ],
)
def test_only_what_was_written_can_be_the_api_servers_doing(difference, written, same):
    assert was_written(difference, written) is same
