"""What a server's memory follows from, and what is said where a pod is given less."""

import pytest

from support import make
from tunesmith_api.artifacts import ModelShape
from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1 import ModelDeployment, Storage
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_api.v1alpha1.task import Task
from tunesmith_operator.core.modeldeployment.memory import need_of, with_memory, with_need
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import template_of

MIB = 1 << 20
# Llama 3.1 8B as Q8_0: 32 layers with 8 heads of 128 numbers for keys and for values
LARGE = ModelRef(
    uri="s3://m/x", digest="d", size_bytes=8_540_000_000,
    shape=ModelShape(kv_bytes_per_token=32 * 8 * 2 * 128 * 2, heads=32, width=4096, feed_forward=14336, vocabulary=128256),
)  # fmt: skip


def template(task: Task = Task.CHAT_SFT, **spec):
    deployment = ModelDeployment.model_validate(make.modeldeployment(**spec))
    return template_of(deployment, SourceModel("s3://m/x", "d", Storage(), task), make.CONFIG)


def revision() -> Revision:
    return Revision(number=1, name="sentiment-r1", hash="h", phase=RevisionPhase.QUANTIZING)


def test_context_is_counted_for_every_request_at_once_and_every_layer():
    few = need_of(template(engine={"contextLength": 8192, "parallelRequests": 1}).plan, LARGE)
    many = need_of(template(engine={"contextLength": 8192, "parallelRequests": 8}).plan, LARGE)
    assert (few.context, many.context) == (2**30, 8 * 2**30)
    assert few.weights == many.weights == LARGE.size_bytes
    assert many.rest - few.rest < 32 * MIB


def test_intermediate_results_grow_with_the_context_of_one_request():
    usual, long = (
        need_of(template(engine={"contextLength": length, "parallelRequests": 1}).plan, LARGE).rest
        for length in (4096, 131072)
    )
    assert long - usual > 7 * 2**30, "attention over 131072 tokens by 32 heads for 512 tokens at once"


def test_a_context_that_fits_no_step_is_rounded_up_as_the_engine_does():
    exact, less = (need_of(template(engine={"contextLength": length}).plan, LARGE).context for length in (512, 300))
    assert exact == less


def test_servers_get_what_is_needed_where_the_spec_says_nothing():
    asked = template()
    sized = with_need(revision(), asked, LARGE, has_servers=False)
    assert sized.phase is RevisionPhase.QUANTIZING
    assert sized.memory_bytes == need_of(asked.plan, LARGE).whole
    assert with_memory(asked, sized).pods.resources.memory == f"{sized.memory_bytes // MIB}Mi"
    given = template(resources={"memory": "32Gi"})
    assert with_memory(given, sized).pods.resources.memory == "32Gi"
    assert given.hash != asked.hash


@pytest.mark.parametrize(("memory", "fails"), [("4Gi", True), ("10Gi", False), (None, False)])
def test_less_than_the_model_takes_is_refused_with_the_sum_and_what_would_do(memory, fails):
    asked = template(resources={"memory": memory})
    sized = with_need(revision(), asked, LARGE, has_servers=False)
    assert (sized.phase is RevisionPhase.FAILED) == fails
    if fails:
        assert sized.reason == "MemoryTooSmall"
        assert "spec.resources.memory is 4Gi" in sized.message
        assert "8145 Mi of weights, 1024 Mi of context (2048 tokens x 4 requests)" in sized.message
        assert f"Set it to {sized.memory_bytes // MIB}Mi, or leave it out, or lower spec.engine." in sized.message


def test_servers_that_are_there_are_not_taken_away():
    asked = template(resources={"memory": "4Gi"})
    assert with_need(revision(), asked, LARGE, has_servers=True).phase is not RevisionPhase.FAILED


def test_an_artefact_that_says_nothing_of_its_shape_gets_the_usual_memory():
    silent = LARGE.model_copy(update={"shape": None})
    assert with_need(revision(), template(), silent, has_servers=False).memory_bytes == 4 * 2**30
    assert with_need(revision(), template(), None, has_servers=True).memory_bytes == 0, (
        "it was in a status that is lost"
    )


def test_classifiers_get_their_weights_in_32_bits_and_a_batch_and_may_have_less():
    small = LARGE.model_copy(update={"size_bytes": 100 * MIB, "shape": None})
    need = need_of(template(Task.SEQUENCE_CLASSIFICATION).plan, small)
    assert (need.least, need.whole) == (612 * MIB, 2248 * MIB)
