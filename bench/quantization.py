"""`python -m bench.quantization`: every method of language models that runs here, on a real model, as a table.

SmolLM2-135M-Instruct is made by each method, twice, and started in the engine that serves it. Perplexity is that of text
that it goes on with (pieces of the GPL), asked as the quality gate asks; those with an importance matrix are calibrated on
other licenses and on tweets. The table goes to docs/quantization.md with `--write`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import assets
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.quantization import CALIBRATED_METHODS, QuantizationMethod
from tunesmith_server.artifact import model_path
from tunesmith_server.calibration.texts import Texts
from tunesmith_server.evaluation.answers import start
from tunesmith_server.evaluation.interview import Task
from tunesmith_server.evaluation.rows import Message, Row
from tunesmith_server.quantizers import quantizer_of
from tunesmith_server.quantizers.base import PLAIN, Made, Options

THREADS: Final = 1
LICENSES: Final = Path("/usr/share/common-licenses")
ROWS, PROMPT_CHARACTERS, REFERENCE_CHARACTERS = 8, 300, 500
TWEETS: Final = 96
PAGE: Final = Path("docs/quantization.md")


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    method: str
    engine: str
    megabytes: float
    bits: float
    perplexity: float
    tokens_per_second: float
    memory: float
    same_bytes: bool


def rows() -> tuple[Row, ...]:
    """Pieces of the GPL: the beginning of each in the question, the rest as the reference."""
    text = " ".join((LICENSES / "GPL-3").read_text().split())
    step = len(text) // ROWS
    pieces = (text[at : at + PROMPT_CHARACTERS + REFERENCE_CHARACTERS] for at in range(0, step * ROWS, step))
    return tuple(
        Row(
            messages=(Message(role="user", content=f"Go on with this text: {piece[:PROMPT_CHARACTERS]}"),),
            reference=piece[PROMPT_CHARACTERS:].strip(),
        )
        for piece in pieces
    )


def texts() -> Texts:
    """What the importance matrix is computed from: nothing of what is asked."""
    found: list[Any] = []
    for name in ("Apache-2.0", "MPL-2.0", "Artistic", "CC0-1.0"):
        whole = " ".join((LICENSES / name).read_text().split())
        found += [whole[at : at + 3000] for at in range(0, len(whole), 3000)]
    for row in assets.labelled(TWEETS, 1)[0]:
        question = f"Is the sentiment of this tweet positive, negative or neutral? {row['text']}"
        found.append((("user", question), ("assistant", row["label"])))
    return Texts(tuple(found))


def measured(method: QuantizationMethod, engine: EngineType, options: Options, quantizer: Any, folder: Path) -> Line:
    """Make the files twice, and ask what they hold."""
    digests = []
    for number in (1, 2):
        made: Made = quantizer.make(method, _empty(folder / str(number)), options)
        files = sorted(path for path in (folder / str(number)).rglob("*") if path.is_file())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder / "2")
    plan = ServingPlan(
        name="smol", namespace="n", uid="u", revision="r", model_uri="s3://models/m", quantization=method, engine=engine,
        context_length=1024, parallel_requests=1, artifact_uri="s3://models/m/quantized",
    )  # fmt: skip
    command = [sys.executable, "-m", "bench.quantization", "--ask", str(model_path(plan, folder / "1"))]
    done = subprocess.run(
        command, input=Task(plan=plan, rows=rows()).to_json(), capture_output=True, text=True, check=True
    )
    asked = json.loads(done.stdout.splitlines()[-1])
    name = f"{method} with calibration" if options.texts is not None else str(method)
    return Line(name, engine, size / 1e6, size * 8 / made.weights, **asked, same_bytes=digests[0] == digests[1])


def ask(model: Path) -> None:
    """In a process of its own: print what the served model is like."""
    task = Task.from_json(sys.stdin.read())
    interview = start(task, model, THREADS)
    interview.most_tokens = 1
    answers = [interview.answer(row) for row in task.rows]
    speed = interview.speed()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    perplexity = math.exp(sum(it.loss for it in answers) / sum(it.tokens for it in answers))
    print(json.dumps({"perplexity": perplexity, "tokens_per_second": speed, "memory": resident / 1e6}), flush=True)
    os._exit(0)


def table(lines: list[Line], busy: bool) -> str:
    """The page; `busy` where speeds are not those of a machine that does nothing else."""
    head = (
        "# What each method comes to\n\n"
        "Written by `python -m bench.quantization --write` (with `PYTHONPATH=crds:operator:trainer_image:tests:.`): "
        "SmolLM2-135M-Instruct, as served, on one thread. Perplexity is that of text that the model goes on with "
        f"({ROWS} pieces of the GPL), lower is better; calibration is on other licenses and tweets. Of classifiers, "
        f"`python -m bench.classifier` measures `Int8`.{' The machine had other work at the time: compare speeds, and do not quote them.' if busy else ''}\n\n"
        "| `method` | engine | MB | bits per weight | perplexity | tokens/s | resident MB | made again: same bytes |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {it.method} | {it.engine} | {it.megabytes:.0f} | {it.bits:.1f} | {it.perplexity:.2f} | "
        f"{it.tokens_per_second:.0f} | {it.memory:.0f} | {'yes' if it.same_bytes else 'no'} |\n"
        for it in lines
    )


def main() -> None:
    """Measure all; print the table and one JSON object."""
    lines, calibrated, busy = [], Options(texts=texts()), os.getloadavg()[0] > 1
    with tempfile.TemporaryDirectory() as name:
        for engine, methods in ENGINE_METHODS.items():
            if engine not in (EngineType.LLAMA_CPP, EngineType.TRANSFORMERS):
                continue
            quantizers: dict[Any, Any] = {}
            for method in methods:
                kind = quantizer_of(engine, method)
                quantizer = quantizers.setdefault(kind, kind(assets.smollm2(), Path(name) / kind.__name__, THREADS))
                with_matrix = engine is EngineType.LLAMA_CPP and method in CALIBRATED_METHODS
                for options in (PLAIN, calibrated) if with_matrix else (PLAIN,):
                    lines.append(measured(method, engine, options, quantizer, Path(name) / "made"))
                    print(lines[-1], file=sys.stderr)
    page = table(lines, busy)
    if "--write" in sys.argv:
        PAGE.write_text(page)
    print(page)
    print(json.dumps([vars(it) for it in lines]))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(Path(sys.argv[2]))
    else:
        main()
