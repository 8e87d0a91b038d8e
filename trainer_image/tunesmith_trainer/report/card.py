"""The model card: `README.md` beside the weights, with the metadata that the Hub reads. Called by `export`.

It says what the model is made from and how, how well it does against where it started, how to use it, and what is not
known of it. All of it comes from the run's record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from textwrap import dedent

from huggingface_hub import EvalResult, ModelCardData

from tunesmith_api.v1alpha1.task import AUTO_CLASSES, ProblemType, Task
from tunesmith_store.volumes import loadable
from tunesmith_trainer.report.formatting import change, count, duration, metric, percent
from tunesmith_trainer.report.record import RunRecord
from tunesmith_trainer.report.verdict import Level, verdict_of

__all__ = ["model_card"]

IMAGE_TEXT = "image-text-to-text"
SHOWN_SETTINGS = (
    "training.numTrainEpochs",
    "training.maxSteps",
    "training.learningRate",
    "training.lrSchedulerType",
    "training.warmupRatio",
    "training.optim",
    "training.weightDecay",
    "training.globalBatchSize",
    "training.maxLength",
    "training.seed",
    "method.type",
    "method.lora.r",
    "method.lora.alpha",
    "method.lora.targetModules",
    "method.qat.scheme",
    "method.pruning.type",
    "method.pruning.sparsityPercent",
    "method.distillation.teacherUri",
)
HUB_METRICS = {"mse": "mse", "mae": "mae", "bleu": "bleu", "rougeL": "rouge", "chrf": "chrf", "f1": "f1"} | {
    name: name for name in ("accuracy", "precision", "recall", "perplexity")
}


def model_card(record: RunRecord) -> str:
    """Return the model card as Markdown with YAML front matter."""
    plan = record.plan
    sections = [
        f"---\n{_metadata(record)}\n---",
        f"# {plan.name}",
        _summary(record),
        "## Results",
        *_results(record),
        "## Use",
        f"```python\n{usage(record)}\n```",
        "## Training",
        *_training(record),
        "## Data",
        *_data(record),
        "## Limits",
        "\n".join(f"* {line}" for line in _limits(record)),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(record: RunRecord) -> str:
    plan = record.plan
    base = plan.base_model.removeprefix("hf://") if plan.base_model.startswith("hf://") else None
    data = [
        name.removeprefix("hf://").removeprefix("datasets/") for name in (plan.train_data,) if name.startswith("hf://")
    ]
    fields = ModelCardData(
        base_model=base,
        library_name="peft" if plan.adapter_only else "transformers",
        pipeline_tag=record.pipeline_tag,
        tags=["tunesmith", "fine-tuned", plan.method.split()[0].lower()],
        datasets=data or None,
        metrics=sorted(
            {HUB_METRICS[name] for name in (record.after.metrics if record.after else ()) if name in HUB_METRICS}
        )
        or None,
        model_name=plan.name,
        eval_results=_eval_results(record),
    )
    # adapters refer to their base by this in peft's own files too
    fields["base_model_relation"] = None if base is None else "adapter" if plan.adapter_only else "finetune"
    return str(fields.to_yaml()).strip()


def _eval_results(record: RunRecord) -> list[EvalResult] | None:
    if record.after is None:
        return None
    name = record.plan.eval_data or record.plan.train_data
    return [
        EvalResult(
            task_type=record.pipeline_tag,
            dataset_type=name.removeprefix("hf://").removeprefix("datasets/"),
            dataset_name=f"{name} (held out)",
            metric_type=HUB_METRICS.get(metric_name, metric_name),
            metric_name=metric(metric_name, record.counts_entities).label,
            metric_value=round(value, 6),
        )
        for metric_name, value in record.after.metrics.items()
        if math.isfinite(value)
    ] or None


def _summary(record: RunRecord) -> str:
    plan, verdict = record.plan, verdict_of(record)
    revision = f" (revision `{plan.base_revision}`)" if plan.base_revision else ""
    how = f"({plan.task.value}, {plan.method})"
    made = f"`{plan.base_model}`{revision}, fine-tuned on `{plan.train_data}` {how} by Tunesmith."
    return f"{made}\n\n**{verdict.headline}** {verdict.detail}".strip()


def _results(record: RunRecord) -> Iterator[str]:
    if record.after is None:
        yield "No held-out data was given, so nothing was measured."
        return
    rows = ["| held-out data | before | after | change |", "|---|--:|--:|--:|"]
    for name, value in record.after.metrics.items():
        described = metric(name, record.counts_entities)
        old = record.before.metrics.get(name) if record.before else None
        moved = change(described, old, value) if old is not None else ""
        rows.append(f"| {described.label} | {described.text(old)} | {described.text(value)} | {moved} |")
    yield "\n".join(rows)
    if record.model and record.model.metrics is not None:
        yield "Measured on the model as it is saved here, read back from its files."
    yield "Curves, mistakes and samples are in `report.html`."


def _training(record: RunRecord) -> Iterator[str]:
    settings = record.plan.settings
    rows = ["| setting | |", "|---|---|"]
    rows += [f"| `{name}` | {_cell(settings[name])} |" for name in SHOWN_SETTINGS if name in settings]
    facts = record.environment
    if record.history:
        rows.append(f"| steps | {count(record.history[-1].step)} |")
    if facts.trained_parameters is not None and facts.total_parameters:
        share = percent(facts.trained_parameters / facts.total_parameters)
        rows.append(
            f"| trained parameters | {count(facts.trained_parameters)} of {count(facts.total_parameters)} ({share}) |"
        )
    if record.model and record.model.dtype:
        rows.append(f"| weights saved as | {record.model.dtype} |")
    rows.append(f"| hardware | {facts.workers} × {facts.device}, {facts.precision} |")
    if facts.train_seconds:
        rows.append(f"| time in steps | {duration(facts.train_seconds)} |")
    rows += [f"| {name} | {version} |" for name, version in facts.versions.items()]
    yield "\n".join(rows)


def _data(record: RunRecord) -> Iterator[str]:
    data = record.data
    examples = (
        "streamed training examples"
        if data.train_examples is None
        else f"{count(data.train_examples)} training examples"
    )
    lines = [f"* {examples}, {count(data.eval_examples)} held-out examples"]
    if data.train_tokens is not None:
        lines.append(f"* {count(data.train_tokens)} training tokens")
    if data.truncated:
        lines.append(f"* {count(data.truncated)} training examples cut at {record.plan.max_length} tokens")
    if data.duplicates:
        lines.append(f"* {count(data.duplicates)} duplicates left out")
    if data.bad_rows:
        lines.append(f"* {count(data.bad_rows)} unusable rows left out")
    yield "\n".join(lines)
    if data.classes:
        rows = ["| class | training | held out |", "|---|--:|--:|"]
        rows += [
            f"| {_cell(item.label)} | {count(item.train)} | {count(item.held_out)} |" for item in data.classes[:50]
        ]
        yield "\n".join(rows)


def _cell(text: str) -> str:
    """Keep what a user has named from breaking the table."""
    return " ".join(text.split()).replace("|", "\\|")


def _limits(record: RunRecord) -> Iterator[str]:
    for found in verdict_of(record).findings:
        if found.level is Level.WARNING:
            yield f"{found.title}: {found.text}"
    if record.model and record.model.rounding:
        yield f"Number format: {record.model.rounding}."
    if record.plan.adapter_only and record.plan.method.startswith("QLoRA"):
        yield "The adapter was trained and measured over the base in 4 bits; over the base as stored it may differ."
    yield f"Longer inputs than the {record.plan.max_length} tokens of training were not tried."
    yield "Inputs unlike the training data (other languages, topics or styles) were not measured, nor bias and safety."
    yield "The licences of the base model and of the data apply."


# ---- how to use it

_CHAT = """
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_IMAGE_CHAT = """
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TEXT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_MASKED = """
inputs = tokenizer(f"The weather is {tokenizer.mask_token} today.", return_tensors="pt")
logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
print(tokenizer.convert_ids_to_tokens(logits[0].topk(5).indices.tolist()))
"""
_SINGLE_LABEL = """
inputs = tokenizer("A text to classify", return_tensors="pt")
probabilities = model(**inputs).logits.softmax(-1)[0].tolist()
print({name: probabilities[number] for number, name in model.config.id2label.items()})
"""
_MULTI_LABEL = """
inputs = tokenizer("A text to classify", return_tensors="pt")
probabilities = model(**inputs).logits.sigmoid()[0].tolist()
print([name for number, name in model.config.id2label.items() if probabilities[number] > 0.5])
"""
_NUMBER = """
inputs = tokenizer("A text to rate", return_tensors="pt")
print(model(**inputs).logits.item())
"""
_TOKENS = """
inputs = tokenizer("Ada Lovelace lived in London".split(), is_split_into_words=True, return_tensors="pt")
classes = model(**inputs).logits[0].argmax(-1).tolist()
print([(word, model.config.id2label[number]) for word, number in zip(inputs.tokens(), classes)])
"""
_SEQ2SEQ = """
inputs = tokenizer("A source text", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_IMAGE = """
inputs = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])
"""
_REWARD = """
messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how can I help?"}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits.item())
"""


def usage(record: RunRecord) -> str:
    """Return Python code that loads the model from its folder and runs it once."""
    plan = record.plan
    sees = record.pipeline_tag == IMAGE_TEXT
    auto = "AutoModelForImageTextToText" if sees else AUTO_CLASSES[plan.task]
    reader, loader = "tokenizer", "AutoTokenizer"
    if sees:
        reader, loader = "processor", "AutoProcessor"
    elif plan.task is Task.IMAGE_CLASSIFICATION:
        reader, loader = "processor", "AutoImageProcessor"
    lines = ["from PIL import Image"] if plan.task is Task.IMAGE_CLASSIFICATION else []
    lines += ["from peft import PeftModel"] if plan.adapter_only else []
    # a name without a dot would be looked for on the Hub
    folder = f"./{plan.name}"
    lines += [f"from transformers import {', '.join(sorted((auto, loader)))}", ""]
    lines += [f"# {folder} is the folder that this card lies in"]
    lines += [f'{reader} = {loader}.from_pretrained("{folder}")']
    if plan.adapter_only:
        base = loadable(plan.base_model)
        lines += [] if base else [f"# ./base is a copy of {plan.base_model}"]
        revision = f', revision="{plan.base_revision}"' if plan.base_revision else ""
        lines += [f'base = {auto}.from_pretrained("{base or "./base"}"{revision}{_head(record)})']
        lines += [f'model = PeftModel.from_pretrained(base, "{folder}").eval()']
    else:
        lines += [f'model = {auto}.from_pretrained("{folder}")']
    return "\n".join(lines) + "\n" + dedent(_IMAGE_CHAT if sees else _run(record)).rstrip()


def _head(record: RunRecord) -> str:
    """The arguments that give a base model the head that an adapter was trained with."""
    plan = record.plan
    if plan.task is Task.REWARD or plan.problem_type is ProblemType.REGRESSION:
        return ", num_labels=1"
    if plan.task not in {Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.IMAGE_CLASSIFICATION}:
        return ""
    names = {number: item.label for number, item in enumerate(record.data.classes)}
    return f", num_labels={len(names)}, id2label={names}" if names else ""


def _run(record: RunRecord) -> str:
    match record.plan.task:
        case Task.CHAT_SFT | Task.DPO:
            return _CHAT
        case Task.CAUSAL_LM:
            return _TEXT
        case Task.MASKED_LM:
            return _MASKED
        case Task.TOKEN_CLASSIFICATION:
            return _TOKENS
        case Task.SEQ2SEQ:
            return _SEQ2SEQ
        case Task.REWARD:
            return _REWARD
        case Task.IMAGE_CLASSIFICATION:
            return _IMAGE
        case Task.SEQUENCE_CLASSIFICATION:
            kinds = {ProblemType.MULTI_LABEL: _MULTI_LABEL, ProblemType.REGRESSION: _NUMBER}
            return kinds.get(record.plan.problem_type, _SINGLE_LABEL)
