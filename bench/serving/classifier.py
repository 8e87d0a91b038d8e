"""What 8 bits do to a served classifier. Called by `figures`.

MiniLM learns the sentiment of tweets and is then served by the engine Transformers, in 32 bits (method None) and by ONNX
Runtime (method Int8). Throughput is that of single texts from CLIENTS clients through HTTP; accuracy is that on
held-out tweets, in points.
"""

from __future__ import annotations

import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import assets
from bench.runs import Figures, median, say
from bench.serving.servers import cores
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.engines.transformers import TransformersEngine
from tunesmith_server.quantizers import quantizer_of

__all__ = ["measure"]

TRAIN, HELD_OUT_PER_CLASS, EPOCHS, BATCH, RATE = 900, 150, 2, 16, 1e-4
CLIENTS = 8
METHODS = (QuantizationMethod.NONE, QuantizationMethod.INT8)


def measure(runs: int, scratch: Path) -> Figures:
    """Train, serve both, take turns in measuring them; a first turn doesn't count."""
    rows = trained(scratch / "trained")
    engines = {method: served(scratch / "trained", method, scratch) for method in METHODS}
    speeds: dict[QuantizationMethod, list[float]] = {method: [] for method in METHODS}
    answers: dict[QuantizationMethod, list[str]] = {}
    for number in range(runs + 1):
        for method in METHODS if number % 2 else METHODS[::-1]:
            speed, answers[method] = measured(engines[method], rows)
            if number:
                speeds[method].append(speed)
    none, int8 = METHODS
    say(f"texts per second: {none} {median(speeds[none]):.0f}, {int8} {median(speeds[int8]):.0f}")
    right = {
        method: sum(label == row["label"] for label, row in zip(found, rows, strict=True))
        for method, found in answers.items()
    }
    agree = sum(left == other for left, other in zip(answers[none], answers[int8], strict=True))
    ratios = [mine / other for mine, other in zip(speeds[int8], speeds[none], strict=True)]
    return {
        "classifier_int8_vs_fp32": median(ratios),
        "classifier_accuracy_delta": 100 * (right[int8] - right[none]) / len(rows),
        "classifier_accuracy_fp32": 100 * right[none] / len(rows),
        "classifier_agreement": 100 * agree / len(rows),
    }


def trained(folder: Path) -> list[dict[str, str]]:
    """Write a classifier of tweets to `folder`; return the tweets that it has not seen."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(cores())
    names = dict(enumerate(assets.LABELS))
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    model = AutoModelForSequenceClassification.from_pretrained(
        assets.minilm(), id2label=names, label2id={name: number for number, name in names.items()}
    ).train()
    model.get_input_embeddings().requires_grad_(False)  # half of the weights, and too few tweets to learn them from
    learned, held_out = assets.labelled(TRAIN, HELD_OUT_PER_CLASS)
    learned.sort(key=lambda row: len(row["text"]))
    batches = [learned[start : start + BATCH] for start in range(0, len(learned), BATCH)]
    optimizer = torch.optim.AdamW((it for it in model.parameters() if it.requires_grad), RATE)
    for epoch in range(EPOCHS):
        for rows in random.Random(epoch).sample(batches, len(batches)):
            inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
            labels = torch.tensor([assets.LABELS.index(row["label"]) for row in rows])
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return held_out


def served(source: Path, method: QuantizationMethod, scratch: Path) -> TransformersEngine:
    """Quantize and serve."""
    folder = scratch / method.value
    folder.mkdir()
    quantizer_of(EngineType.TRANSFORMERS, method)(source, scratch / f"{method.value}-work", cores()).make(
        method, folder
    )
    plan = ServingPlan(
        name="m", namespace="n", uid="u", revision="m-r1", model_uri="s3://m/m", quantization=method,
        engine=EngineType.TRANSFORMERS, context_length=128, parallel_requests=CLIENTS, artifact_uri="s3://m/m/q",
    )  # fmt: skip
    return TransformersEngine(plan, folder, cores(), host="127.0.0.1", port=0)


def label_of(engine: TransformersEngine, text: str) -> str:
    """The likeliest class of one text, asked for by HTTP."""
    body = json.dumps({"inputs": text}).encode()
    request = urllib.request.Request(engine.url + "/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: list[list[dict[str, Any]]] = json.load(response)
    return str(answer[0][0]["label"])


def measured(engine: TransformersEngine, rows: list[dict[str, str]]) -> tuple[float, list[str]]:
    """Texts per second, and what was answered."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        labels = list(pool.map(lambda row: label_of(engine, row["text"]), rows))
    return len(rows) / (time.perf_counter() - started), labels
