"""Two "pods" without Kubernetes: two network namespaces joined by a cable, a supervisor in each, a real S3 store.

The fixed ports of a trainer pod need a network of their own. Linux namespaces belong to threads: the test's thread moves into pod 0's
namespace for the time of the module, everything that it starts goes with it, and it moves back at the end.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest

from objectstore import ObjectStore
from support.plans import optimization, training_plan
from tunesmith_api import keys
from tunesmith_api.plan import StoragePlan, TrainingPlan
from tunesmith_api.reports import ProgressReport, TerminationReport

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)
IPS = ("10.77.0.1", "10.77.0.2")
HERE = Path(__file__).resolve()
sys.path.insert(0, str(Path(__file__).parent))  # for `ranks`, which its child processes import too
ROOT = HERE.parents[3]
PRELOADED = [
    "bitsandbytes", "boto3", "peft", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
    "tunesmith_trainer.distributed.parallel", "tunesmith_trainer.group", "tunesmith_trainer.loop.run", "tunesmith_trainer.methods",
]  # fmt: skip
PATIENCE = 300
"""Seconds for what takes a tenth of that on a machine that has nothing else to do."""


def conversations(count: int, offset: int = 0) -> list[dict]:
    """Small sums: real structure to learn, of different lengths, some with two turns."""
    rows = []
    for number in range(offset, offset + count):
        a, b = number * 7 % 23, number * 5 % 19
        messages = [
            {"role": "user", "content": f"add {a} and {b}" + " please" * (number % 3)},
            {"role": "assistant", "content": f"{a + b}"},
        ]
        if number % 4 == 0:
            messages += [{"role": "user", "content": "and one more"}, {"role": "assistant", "content": f"{a + b + 1}"}]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A real Llama of 60 thousand random parameters, with a byte-level tokenizer and ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def two_networks():
    """Move this thread into pod 0's namespace; yield the file that names pod 1's."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    if LIBC.unshare(CLONE_NEWNET):
        os.close(home)
        pytest.skip("needs root: network namespaces")
    other = None
    try:
        other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while os.readlink(f"/proc/{other.pid}/ns/net") == os.readlink("/proc/thread-self/ns/net"):
            time.sleep(0.01)
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "pod0", "type", "veth", "peer", "name", "pod1", "netns", str(other.pid))
        _run("ip", "addr", "add", f"{IPS[0]}/24", "dev", "pod0")
        _run("ip", "link", "set", "pod0", "up")
        inside = ("nsenter", f"--net=/proc/{other.pid}/ns/net")
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "addr", "add", f"{IPS[1]}/24", "dev", "pod1")
        _run(*inside, "ip", "link", "set", "pod1", "up")
        yield f"/proc/{other.pid}/ns/net"
    finally:
        if other is not None:
            other.kill()
            other.wait()
        LIBC.setns(home, CLONE_NEWNET)
        os.close(home)


@dataclass
class Pod:
    """One supervisor and everything below it."""

    index: int
    folder: Path
    process: subprocess.Popen
    log: Path

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The whole pod at once, as when its node is lost."""
        for pid in [*self.descendants(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=PATIENCE)

    def descendants(self) -> list[int]:
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
        found, level = [], {self.process.pid}
        while level:
            level = {pid for pid, parent in parents.items() if parent in level}
            found += level
        return found

    def ranks(self) -> list[int]:
        """Pids of the training processes that run here."""
        alive = set(self.descendants())
        return [int(path.name) for path in (self.folder / "scratch" / "ranks").glob("*") if int(path.name) in alive]

    def number(self, pid: int) -> int:
        """Which of the training processes of this pod that is."""
        return int(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2])

    def driver(self) -> int:
        for pid in self.descendants():
            if b"tunesmith_trainer.group.driver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise LookupError("no driver")

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(timeout=seconds)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def report(self) -> TerminationReport:
        return TerminationReport.from_json((self.folder / "termination").read_bytes())

    def result(self) -> TerminationReport:
        """What the driver has written down, which the supervisor makes a report of."""
        return TerminationReport.from_json((self.folder / "scratch" / "result.json").read_bytes())


@dataclass
class Pods:
    """Starts pods of one plan."""

    store: ObjectStore
    network: str
    folder: Path
    token: str = "token-of-the-test-0123456789abcdef"
    started: list[Pod] = field(default_factory=list)

    def start(self, plan: TrainingPlan, index: int = 0, module: str = "tunesmith_trainer") -> Pod:
        """The supervisor, with all that it starts, or another program of a pod's."""
        number = len(self.started)
        folder = self.folder / f"{number}"
        (folder / "scratch").mkdir(parents=True)
        plan = plan.model_copy(update={"storage": StoragePlan(endpoint_url=self.store.endpoint_url)})
        (folder / "plan.json").write_text(plan.to_json())
        environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ},
            **self.store.credentials.environment(),
            "PYTHONPATH": f"{ROOT}/crds:{ROOT}/trainer_image",
            keys.ENV_WORKER_INDEX: str(index),
            keys.ENV_POD_IP: IPS[index],
            keys.ENV_POD_NAME: f"job-1-{index}",
            keys.ENV_RAY_TOKEN: self.token,
            keys.ENV_PLAN: str(folder / "plan.json"),
            keys.ENV_SCRATCH: str(folder / "scratch"),
            keys.ENV_TERMINATION_LOG: str(folder / "termination"),
            keys.ENV_CPU_LIMIT: f"{1000 * plan.processes_per_worker}",
            keys.ENV_PROCESSES: f"{plan.processes_per_worker}",
        }
        inside = ["nsenter", f"--net={self.network}"] if index else []
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*inside, sys.executable, "-m", module],
                env=environment,
                stdout=output,
                stderr=output,
                cwd=folder,
            )
        pod = Pod(index, folder, process, log)
        self.started.append(pod)
        return pod

    def progress(self) -> ProgressReport | None:
        try:
            with urllib.request.urlopen(
                f"http://{IPS[0]}:{keys.PORT_PROGRESS}{keys.PATH_PROGRESS}", timeout=2
            ) as answer:
                return ProgressReport.from_json(answer.read())
        except OSError:
            return None

    def wait_for(self, condition, timeout: float = PATIENCE, what: str = "the condition"):
        """Wait until condition(progress) is true; fail with the logs otherwise."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            report = self.progress()
            if report is not None and condition(report):
                return report
            if all(pod.process.poll() is not None for pod in self.started):
                break
            time.sleep(0.1)
        logs = "\n".join(f"--- pod {pod.index}\n{pod.output()[-6000:]}" for pod in self.started)
        raise AssertionError(f"waited in vain for {what}; last progress {self.progress()}\n{logs}")

    def ask_ray(self, token: str) -> tuple[int, str]:
        """What Ray tells a client on the pods' own network: exit code and output."""
        ask = "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR'); print('joined')"
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(self.folder)}
        command = [sys.executable, "-c", ask, f"{IPS[0]}:{keys.PORT_RAY_GCS}"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=self.folder, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def history(self, uri: str) -> list[dict]:
        return json.loads(self.store.get_bytes(f"{uri}/metrics.json"))["history"]

    def close(self) -> None:
        for pod in self.started:
            if pod.process.poll() is None:
                pod.kill()
        self.started.clear()


@pytest.fixture(scope="session")
def forks():
    """Makes processes that are new and have everything imported: seconds of CPU that each would take anew."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # heeded before the first process: there is one such server
    return context


@pytest.fixture(scope="module")
def pool(forks):
    """Two processes for `ranks`."""
    with ProcessPoolExecutor(2, mp_context=forks) as processes:
        yield processes


@pytest.fixture(scope="module")
def networks():
    with two_networks() as other:
        yield other


@pytest.fixture(scope="module")
def pod_store(networks, tmp_path_factory):
    """An S3 store that both pods reach."""
    with ObjectStore.start(tmp_path_factory.mktemp("podstore"), bind_ip=IPS[0], die_with_parent=True) as store:
        yield store


@pytest.fixture
def pods(networks, pod_store):
    # Ray's socket paths must be short
    folder = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
    group = Pods(pod_store, networks, folder)
    try:
        yield group
    finally:
        group.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def job(pod_store, tiny_model, request) -> str:
    """`s3://…` of a bucket with a tiny model and data."""
    name = "b" + str(abs(hash(request.node.nodeid)))[:12]
    base = pod_store.ensure_bucket(name)
    pod_store.put_folder(tiny_model, f"{base}/model")
    pod_store.put_json_lines(conversations(96), f"{base}/train.jsonl")
    pod_store.put_json_lines(conversations(12, 1000), f"{base}/eval.jsonl")
    return base


@pytest.fixture
def make_plan():
    return training_plan


@pytest.fixture
def make_training():
    return optimization


@pytest.fixture
def rows():
    return conversations
