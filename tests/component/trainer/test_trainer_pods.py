"""Whole trainer pods: real supervisors, Ray, gloo, S3; killed in every way that a cluster kills."""

import json
import os
import signal

from tunesmith_api.reports import Outcome, TrainerState
from tunesmith_api.v1alpha1.finetunejob import MethodType


def test_two_pods_train_to_the_end(pods, job, make_plan):
    plan = make_plan(job, replicas=2, method=MethodType.LORA)
    head, other = pods.start(plan, 0), pods.start(plan, 1)
    assert head.wait() == 0, head.output() + other.output()
    report = head.report()
    print(head.output())
    print(other.output())
    print(report)
    assert report.outcome is Outcome.SUCCEEDED
    assert report.global_step == 12
    assert [record["step"] for record in pods.history(plan.output_uri)] == list(range(1, 13))
