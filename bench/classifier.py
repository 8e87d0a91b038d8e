"""`python -m bench.classifier`: what 8 bits do to a served classifier. The last line is one JSON object.

MiniLM learns the sentiment of tweets and is then served by the engine Transformers, in 32 bits (method None) and by ONNX
Runtime (method Int8). Throughput is that of single texts from CLIENTS clients through HTTP; accuracy is that on
held-out tweets, in points.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import assets
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.engines.transformers import TransformersEngine
from tunesmith_server.quantizers import quantizer_of

TRAIN, HELD_OUT_PER_CLASS, EPOCHS, BATCH, RATE = 900, 150, 2, 16, 1e-4
CLIENTS, RUNS, THREADS = 8, 5, 2
METHODS = (QuantizationMethod.NONE, QuantizationMethod.INT8)


def trained(folder: Path) -> list[dict[str, str]]:
    """Write a classifier of tweets to `folder`; return the tweets that it has not seen."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
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
    quantizer_of(EngineType.TRANSFORMERS, method)(source, scratch / f"{method.value}-work", THREADS).make(
        method, folder
    )
    plan = ServingPlan(
        name="m", namespace="n", uid="u", revision="m-r1", model_uri="s3://m/m", quantization=method,
        engine=EngineType.TRANSFORMERS, context_length=128, parallel_requests=CLIENTS, artifact_uri="s3://m/m/q",
    )  # fmt: skip
    return TransformersEngine(plan, folder, THREADS, host="127.0.0.1", port=0)


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


def main() -> None:
    """Train, serve both, take turns in measuring them."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = trained(Path(scratch) / "trained")
        engines = {method: served(Path(scratch) / "trained", method, Path(scratch)) for method in METHODS}
        speeds: dict[QuantizationMethod, list[float]] = {method: [] for method in METHODS}
        answers: dict[QuantizationMethod, list[str]] = {}
        for _ in range(RUNS):
            for method, engine in engines.items():
                speed, answers[method] = measured(engine, rows)
                speeds[method].append(speed)
        for method in METHODS:
            print(f"{method}: {statistics.median(speeds[method]):.0f} texts/s", file=sys.stderr)
    right = {
        method: sum(label == row["label"] for label, row in zip(found, rows, strict=True))
        for method, found in answers.items()
    }
    agree = sum(left == right_ for left, right_ in zip(*answers.values(), strict=True))
    none, int8 = METHODS
    print(
        json.dumps(
            {
                "classifier_int8_vs_fp32": round(statistics.median(speeds[int8]) / statistics.median(speeds[none]), 2),
                "classifier_accuracy_delta": round(100 * (right[int8] - right[none]) / len(rows), 2),
                "classifier_accuracy_fp32": round(100 * right[none] / len(rows), 2),
                "classifier_agreement": round(100 * agree / len(rows), 2),
            }
        )
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
