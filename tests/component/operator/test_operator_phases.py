"""On the way to success a job's phase never goes back, whatever is seen late, twice or for a moment not at all."""

import logging

from hypothesis import given, settings
from hypothesis import strategies as st

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")
JOB = "sentiment-1"
ORDER = {"Pending": 0, "Starting": 1, "Evaluating": 2, "Training": 2, "Saving": 3, "Succeeded": 4}


class Run:
    """A job of two workers that succeeds."""

    def __init__(self, earlier_restarts):
        self.world = World()
        self.world.cluster.put(make.finetunejob())
        self.pods, self.seen = {}, []
        self.restarts, self.state = earlier_restarts, None

    def look(self, seconds=1.0):
        """Let the operator look twice: in the second round the poller has let go of a pod that doesn't run."""
        for _ in range(2):
            self.world.wait(seconds)
            if self.world.controller._poller._targets.get(KEY) is None:
                self.world.samples.pop(KEY, None)
            status = self.world.status()
            if status.get("phase"):
                self.seen.append((status["phase"], self.world.condition("Succeeded")[1]))

    def starts(self, index):
        self.pods[index] = self.world.pod(JOB, index, ready=False)

    def ready(self, index):
        raw = self.world.cluster.get("Pod", self.pods.get(index, ""))
        if raw is not None:
            others = [it for it in raw["status"]["conditions"] if it["type"] != "Ready"]
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": self.world.stamp()}
            self.world.cluster.change("Pod", self.pods[index], {"status": {"conditions": [*others, ready]}})

    def says(self, state, **values):
        self.state = (state, values)
        self.is_heard()

    def is_heard(self):
        raw = self.world.cluster.get("Pod", self.pods.get(0, ""))
        if self.state is None or raw is None or "running" not in raw["status"]["containerStatuses"][0]["state"]:
            return
        state, values = self.state
        # those of an earlier job come with its checkpoint
        restarts = self.restarts if values and "checking" not in values.get("message", "") else 0
        beat = self.world.now.timestamp()
        sample = ProgressReport(state=state, heartbeat_unix=beat, restarts=restarts, **values)
        self.world.samples[KEY] = ProgressSample(raw["metadata"]["uid"], sample, self.world.now)

    def stops(self):
        """The container runs no more, and the kubelet doesn't know its exit code yet."""
        raw = self.world.cluster.get("Pod", self.pods[0])
        raw["status"]["containerStatuses"][0]["state"] = {"waiting": {}}
        self.world.cluster.put(raw)

    def exits(self):
        self.world.exits(self.pods[0], 0, make.succeeded())

    def ends(self):
        self.world.ends(self.pods[0], 0, make.succeeded())


STEPS = [
    lambda run: None,
    lambda run: run.starts(0),
    lambda run: run.starts(1),
    lambda run: run.says(TrainerState.STARTING),
    lambda run: run.says(TrainerState.PREPARING, message="checking data, model and buckets"),
    lambda run: run.says(TrainerState.PREPARING, message="loading model and data"),
    lambda run: run.says(TrainerState.EVALUATING, max_steps=10),
    lambda run: run.says(TrainerState.TRAINING, global_step=3, max_steps=10),
    lambda run: run.says(TrainerState.EVALUATING, global_step=10, max_steps=10),
    lambda run: run.says(TrainerState.SAVING, global_step=10, max_steps=10, message="saving the tuned model"),
    lambda run: run.says(TrainerState.FINISHED, global_step=10, max_steps=10, message="trained 10 steps"),
    Run.stops,
    Run.exits,
    Run.ends,
    lambda run: run.world.job_is(JOB, "SuccessCriteriaMet", "SuccessPolicy"),
    lambda run: run.world.terminates(run.pods[1]),
    lambda run: run.world.ends(run.pods[1], 75),
    lambda run: run.world.cluster.remove("Pod", "ml", run.pods[1]),
    lambda run: run.world.job_is(JOB, "Complete", "SuccessPolicy"),
]


def not_heard(run):
    run.world.samples.pop(KEY, None)


def operator_starts_anew(run):
    run.world.samples.pop(KEY, None)
    run.world._boot()


DISTURBANCES = [
    not_heard,
    operator_starts_anew,
    Run.is_heard,
    lambda run: run.ready(0),
    lambda run: run.ready(1),
    lambda run: run.look(6.0),
    lambda run: run.look(0.2),
]
DISTURBED = st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.sampled_from(DISTURBANCES)), max_size=8)


@settings(max_examples=50, deadline=None)
@given(DISTURBED, st.sets(st.integers(0, len(STEPS) - 1)), st.sampled_from([0, 0, 2]))
def test_the_phase_never_goes_back_and_nothing_is_said_to_be_lost(disturbed, unseen, earlier_restarts):
    logging.disable(logging.CRITICAL)
    try:
        run = Run(earlier_restarts)
        for number, step in enumerate(STEPS):
            step(run)
            for place, disturb in disturbed:
                if place == number:
                    disturb(run)
            if number not in unseen or number in (0, len(STEPS) - 1):
                run.look()
        phases = [ORDER[phase] for phase, _ in run.seen]
        assert phases == sorted(phases), run.seen
        assert "Restarting" not in {reason for _, reason in run.seen}
        assert run.seen[-1] == ("Succeeded", "Completed")
        assert {reason for _, reason in run.world.cluster.events} <= {"Training", "Completed"}
    finally:
        logging.disable(logging.NOTSET)
