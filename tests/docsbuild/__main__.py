"""`python -m docsbuild`: fine-tune MiniLM on real tweets by `tunesmith run`, and photograph its report.

The job is the sample `finetunejob-bert-sentiment.yaml` with other data and a model that a package carries. The picture
needs a browser (Debian: chromium); without one the report is made and the picture stays as it is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from assets import labelled, minilm
from tunesmith_cli.kubernetes_yaml import parsed

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "manifests" / "samples" / "finetunejob-bert-sentiment.yaml"
PICTURE = ROOT / "docs" / "images" / "report.png"
CLAIM = "pvc://docs"  # so that the picture shows names that could be anybody's
TRAIN, EVAL_PER_CLASS = 640, 60
SIZE = (1180, 1500)


def write_job(folder: Path) -> Path:
    """Write the sample with local data, storage and steps that two cores take a few minutes for."""
    train, held_out = labelled(TRAIN, EVAL_PER_CLASS, seed=5)
    for name, rows in (("train", train), ("eval", held_out)):
        (folder / "tweets").mkdir(exist_ok=True)
        (folder / "tweets" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = parsed(SAMPLE.read_text())[0]
    spec = job["spec"]
    shutil.copytree(minilm(), folder / "minilm-l6")
    spec["model"]["uri"] = f"{CLAIM}/minilm-l6"
    spec["dataset"]["train"]["uri"] = f"{CLAIM}/tweets/train.jsonl"
    spec["dataset"]["eval"]["uri"] = f"{CLAIM}/tweets/eval.jsonl"
    spec["training"] |= {"evalSteps": 15, "learningRate": 1e-4}
    spec["workers"] = {"replicas": 1, "resources": {"cpu": "2", "memory": "4Gi"}}
    spec["checkpoint"] = {"uri": f"{CLAIM}/checkpoints", "everySteps": 100}
    spec["output"] = {"uri": f"{CLAIM}/model"}
    del spec["storage"]
    path = folder / "job.yaml"
    path.write_text(json.dumps(job, indent=1))  # JSON is YAML in which texts stay texts
    return path


def photograph(page: Path, picture: Path) -> bool:
    """Take a picture of a page with headless Chromium; False where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return False
    picture.parent.mkdir(parents=True, exist_ok=True)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", f"--window-size={SIZE[0]},{SIZE[1]}",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([*command, f"--user-data-dir={profile}"], check=True, capture_output=True, timeout=120)
    return True


def main() -> int:
    """Run the job and take the picture."""
    with tempfile.TemporaryDirectory(prefix="docs") as scratch:
        folder = Path(scratch)
        job = write_job(folder)
        command = [sys.executable, "-m", "tunesmith_cli", "run", "-f", str(job), "--volume", f"docs={folder}"]
        done = subprocess.run(command, check=False)
        if done.returncode:
            print(f"the run for the picture failed with exit code {done.returncode}", file=sys.stderr)
            return done.returncode
        page = folder / "model" / "report.html"
        if photograph(page, PICTURE):
            print(f"{PICTURE.relative_to(ROOT)} shows the report of this run")
        else:
            print(
                "no browser to take the picture with: apt-get install chromium, then make docs again", file=sys.stderr
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
