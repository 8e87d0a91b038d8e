"""Several LoRA adapters on one server, with the real small model: converted, chosen by name, added and removed while it answers."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import assets
from tunesmith_api import keys
from tunesmith_api.adapters import AdapterPlan, AdapterSet, ServedAdapter
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.api import Api
from tunesmith_server.adapters.config import CONFIG, WEIGHTS
from tunesmith_server.adapters.served import fetched, wanted_adapters
from tunesmith_server.artifact import fetch_artifact
from tunesmith_server.builder import ArtifactBuilder
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.engines.registry import Launcher
from tunesmith_server.front.server import Front
from tunesmith_server.quantize import quantize
from tunesmith_server.serving import Serving
from tunesmith_store.volumes import VolumeStore

PROMPT = "The capital of France is"
RANK, ALPHA = 4, 8
SIZES = {"q_proj": (576, 576), "k_proj": (576, 192), "down_proj": (1536, 576)}
PLAN = ServingPlan(
    name="smol", namespace="n", uid="u", revision="smol-r1", model_uri="pvc://models/smollm2", quantization="None", engine="LlamaCpp",
    context_length=256, parallel_requests=2, artifact_uri="pvc://models/made",
)  # fmt: skip


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter as PEFT writes it, with random weights that change answers visibly."""
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(30):
        for name, (inputs, outputs) in SIZES.items():
            part = "mlp" if name == "down_proj" else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{key}.lora_A.weight"] = random.normal(0, inputs**-0.5, (RANK, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(0, 0.2, (outputs, RANK)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(SIZES), "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def answer_of_transformers(adapter: Path | None, tokens: int = 8) -> str:
    """What transformers answers with the adapter merged into the weights."""
    import torch
    import transformers
    from safetensors.numpy import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    if adapter is not None:
        weights = load_file(adapter / WEIGHTS)
        for name in weights:
            if ".lora_A." in name:
                product = weights[name.replace("lora_A", "lora_B")] @ weights[name] * (ALPHA / RANK)
                module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight.data += torch.from_numpy(product)
    given = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(made[0][given["input_ids"].shape[1] :])
    return text


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    (root / "models").mkdir()
    (root / "models/smollm2").symlink_to(assets.smollm2())
    for number, name in enumerate(("a", "b")):
        write_adapter(root / "models" / name, seed=number + 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(keys.ENV_VOLUMES, str(root))
        yield root


@pytest.fixture(scope="module")
def base_digest(volumes, tmp_path_factory) -> str:
    """The model's artefact is made; its digest."""
    store = VolumeStore()
    return quantize(PLAN, store, ArtifactBuilder(PLAN, store, tmp_path_factory.mktemp("quantize"), 2)).base_digest


def converted(name: str, base_digest: str, scratch: Path, **changes) -> tuple[int, TerminationReport]:
    """What the Job of an adapter says."""
    adapter = AdapterPlan(name=name, uri=f"pvc://models/{name}", base_digest=base_digest, **changes)
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "plan.json").write_text(PLAN.model_copy(update={"adapter": adapter}).to_json())
    environment = {
        **os.environ,
        keys.ENV_PLAN: str(scratch / "plan.json"),
        keys.ENV_SCRATCH: str(scratch),
        keys.ENV_TERMINATION_LOG: str(scratch / "termination.json"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "tunesmith_server.adapters"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    return done.returncode, TerminationReport.from_json((scratch / "termination.json").read_text())


@pytest.fixture(scope="module")
def adapters(volumes, base_digest, tmp_path_factory) -> dict[str, ServedAdapter]:
    """Both adapters' artefacts, by name."""
    found = {}
    for name in ("a", "b"):
        code, report = converted(name, base_digest, tmp_path_factory.mktemp(name))
        assert code == 0, report
        found[name] = ServedAdapter(name=name, key=name, uri=report.model.uri, digest=report.model.digest)
    return found


def ask(base: str, model: str, prompt: str = PROMPT, tokens: int = 8, **extra) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **extra}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def text_of(answer: dict) -> str:
    return answer["choices"][0]["text"]


class Server:
    """A server pod's parts, and the list that the operator writes for it."""

    def __init__(self, folder: Path) -> None:
        self.list = folder / "list"
        self.list.mkdir()
        store = VolumeStore()
        model = fetch_artifact(store, PLAN, folder)
        environment = {keys.ENV_ADAPTERS: str(self.list)}
        self.serving = Serving(PLAN, Launcher(PLAN, model, 1, lambda phase: None, first_port=0))
        engine = self.serving.start(())
        self.front = Front(engine.url, self.serving.limits_of(engine), Api(), PLAN.parallel_requests)
        self.front.start(0)
        self.base = f"http://127.0.0.1:{self.front.port}"
        fetch = partial(fetched, store, folder=folder / "adapters", engine=PLAN.engine)
        self.serving.follow(lambda: wanted_adapters(environment), fetch, self.front)
        self.asked = 0
        self.failures: list[str] = []

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"{self.base}/v1/models", timeout=60) as response:
            return [it["id"] for it in json.load(response)["data"]]

    def told(self, *adapters: ServedAdapter) -> None:
        """Change the list, and go on asking until the server has it: no request fails meanwhile."""
        (self.list / "new").write_text(AdapterSet(adapters=adapters).to_json())
        (self.list / "new").rename(self.list / keys.ADAPTERS_FILE)
        wanted, deadline = ["smol", *(it.name for it in adapters)], time.monotonic() + 120
        while (
            self.models() != wanted or self.serving.digests.keys() != set(wanted[1:])
        ) and time.monotonic() < deadline:
            assert text_of(ask(self.base, "smol", tokens=4))
            self.asked += 1
        assert self.models() == wanted


@pytest.fixture(scope="module")
def server(base_digest, tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.front.stop()


def test_adapters_come_and_go_while_the_server_answers_and_each_answers_its_own_way(
    server, adapters, volumes, monkeypatch
):
    alone = {"smol": text_of(ask(server.base, "smol"))}
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server.base, "a")
    assert caught.value.code == 404
    assert json.load(caught.value)["error"]["code"] == "model_not_found"

    server.told(adapters["a"], adapters["b"])
    alone |= {name: text_of(ask(server.base, name)) for name in adapters}
    assert alone["a"] == answer_of_transformers(volumes / "models/a")
    assert alone["b"] == answer_of_transformers(volumes / "models/b")
    assert len(set(alone.values())) == 3, alone

    names = ["smol", "a", "b"] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: ask(server.base, name), names))
    assert [text_of(it) for it in together] == [alone[name] for name in names]
    assert [it["model"] for it in together] == names
    metrics = server.front.metrics()
    assert f'tunesmith_adapter_info{{digest="{adapters["a"].digest}",name="a"}} 1.0' in metrics
    assert 'vllm:generation_tokens_total{model_name="a"} 40.0' in metrics

    # as in a pod whose memory doesn't suffice for two engines
    monkeypatch.setattr("tunesmith_server.serving.spare_memory", lambda: 0)
    server.told(adapters["b"])
    assert text_of(ask(server.base, "b")) == alone["b"]
    with pytest.raises(urllib.error.HTTPError):
        ask(server.base, "a")
    server.told()
    assert text_of(ask(server.base, "smol")) == alone["smol"]
    assert "tunesmith_adapter_info{" not in server.front.metrics()
    assert server.asked > 0


def test_what_one_adapter_made_of_a_prompt_is_not_gone_on_with_by_another(server, adapters, base_digest, tmp_path):
    model = fetch_artifact(VolumeStore(), PLAN, tmp_path)
    local = fetched(VolumeStore(), list(adapters.values()), tmp_path / "adapters", PLAN.engine)
    plan = PLAN.model_copy(update={"parallel_requests": 1})
    engine = LlamaEngine(plan, model, 1, port=0, cache_bytes=256 << 20, adapters=local)

    def said(name: str, prompt: str) -> str:
        return text_of(ask(engine.url, name, prompt, **engine.models[name]))

    other = "Once upon a time there was a little dragon who lived in a cave near the sea and had no friends at all"
    first = {name: said(name, PROMPT) for name in ("b", "smol")}
    for name in ("b", "smol"):
        # the state of the prompt with another adapter is put aside, and this adapter is in use when it is found again
        said("a", PROMPT)
        said(name, other)
        assert said(name, PROMPT) == first[name]
    engine.close()


def test_one_of_another_model_is_refused_in_words(volumes, base_digest, tmp_path):
    folder = write_adapter(volumes / "models/wrong", 3)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    code, report = converted("wrong", base_digest, tmp_path)
    assert (code, report.reason) == (40, Reason.ADAPTER_INVALID)
    assert "DoRA" in report.message
