"""Slips in a FineTuneJob and the words that refuse them: the API server's, and the same from the command line.

`change` is a merge patch on manifests/samples/finetunejob.yaml (None removes a field); `complaint` stands in the
answer. Every CEL rule of the kind has at least one entry: tests/unit/api/test_rules.py sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mistake:
    """One slip. `field` is where the answer says it is; empty where a whole object is named."""

    name: str
    change: dict[str, Any]
    complaint: str
    field: str = ""


def _spec(name: str, change: dict[str, Any], complaint: str, field: str = "") -> Mistake:
    return Mistake(name, {"spec": change}, complaint, field)


def _training(name: str, change: dict[str, Any], complaint: str) -> Mistake:
    return _spec(name, {"training": change}, complaint, f"spec.training.{next(iter(change))}")


DATA = {"train": {"uri": "s3://data/tweets/train.jsonl"}}

SHAPES = [
    _spec("an unknown field", {"training": {"learningrate": "1e-3"}}, 'unknown field "spec.training.learningrate"'),
    _spec("an unknown object", {"optimiser": {"lr": 1}}, 'unknown field "spec.optimiser"'),
    _spec("no such method", {"method": {"type": "LORA"}}, 'supported values: "Full", "LoRA", "DoRA"', "spec.method.type"),
    _spec("no such task", {"task": "Chat"}, 'supported values: "ChatSFT", "CausalLM"', "spec.task"),
    _spec("a part missing", {"output": None}, "Required value", "spec.output"),
    _spec("an inner part missing", {"dataset": {"train": None}}, "Required value", "spec.dataset.train"),
    _spec("a number too small", {"workers": {"replicas": 0}}, "should be greater than or equal to 1", "spec.workers.replicas"),
    _spec("a number too large", {"dataset": {"splitPercent": 51, "eval": None}}, "should be less than or equal to 50", "spec.dataset.splitPercent"),
    _training("text for a number", {"maxSteps": "80"}, 'must be of type integer: "string"'),
    _training("a number for text", {"metricForBestModel": 0.001}, 'must be of type string: "number"'),
    _training("a fraction for a whole number", {"maxSteps": 1.5}, 'must be of type integer: "number"'),
    _training("text for a switch", {"packing": "true"}, 'must be of type boolean: "string"'),
    _spec("a number for an object", {"checkpoint": 3}, 'must be of type object: "integer"', "spec.checkpoint"),
    _spec("text for a list", {"method": {"lora": {"targetModules": "q_proj"}}}, 'must be of type array: "string"', "spec.method.lora.targetModules"),
    _spec("a list too long", {"method": {"lora": {"targetModules": [f"m{n}" for n in range(33)]}}}, "Too many: 33: must have at most 32 items", "spec.method.lora.targetModules"),
    _spec("a name twice", {"method": {"lora": {"targetModules": ["q_proj", "v_proj", "q_proj"]}}}, 'Duplicate value: "q_proj"', "spec.method.lora.targetModules[2]"),
    _spec("an empty list", {"method": {"lora": {"targetModules": []}}}, "should have at least 1 items", "spec.method.lora.targetModules"),
    _spec("empty text", {"model": {"revision": ""}}, "should be at least 1 chars long", "spec.model.revision"),
    _spec("text too long", {"model": {"revision": "r" * 129}}, "may not be more than 128", "spec.model.revision"),
    _spec("a list for a quantity", {"workers": {"resources": {"cpu": [1]}}}, 'must be of type integer,string: "array"', "spec.workers.resources.cpu"),
    _spec("text that is no quantity", {"workers": {"resources": {"cpu": "lots"}}}, "in body should match", "spec.workers.resources.cpu"),
    _spec("too many labels", {"workers": {"nodeSelector": {f"l{n}": "x" for n in range(17)}}}, "Too many: 17: must have at most 16 items", "spec.workers.nodeSelector"),
    _spec("a number for a label", {"workers": {"nodeSelector": {"a": 1}}}, 'must be of type string: "integer"', "spec.workers.nodeSelector.a"),
    _spec("an unknown field in a list", {"workers": {"tolerations": [{"key": "a", "value": "b"}, {"keys": "x"}]}}, 'unknown field "spec.workers.tolerations[1].keys"'),
    _spec("no such operator", {"workers": {"tolerations": [{"operator": "In"}]}}, 'supported values: "Exists", "Equal"', "spec.workers.tolerations[0].operator"),
    _spec("no multiple", {"method": {"type": "Full", "lora": None, "qat": {"groupSize": 24}}}, "should be a multiple of 16", "spec.method.qat.groupSize"),
]  # fmt: skip

RULES = [
    _spec("an address without its scheme", {"storage": {"endpointURL": "store:8333"}}, "an address begins with http:// or https://", "spec.storage.endpointURL"),
    _spec("a label of the operator's", {"workers": {"podTemplate": {"labels": {"tunesmith.dev/finetunejob": "x"}}}}, "labels and annotations of tunesmith.dev are the operator's own", "spec.workers.podTemplate.labels"),
    _spec("a bad URI", {"model": {"uri": "s3:/models/x"}}, "a URI begins with its scheme: s3://bucket/key, pvc://claim/path or hf://owner/name", "spec.model.uri"),
    _spec("a name without hf://", {"model": {"uri": "gpt2"}}, "a URI begins with its scheme", "spec.model.uri"),
    _spec("a password in a URI", {"model": {"uri": "s3://me:secret@models/x"}}, "a bucket's name has 3 to 63 letters", "spec.model.uri"),
    _spec("no bucket", {"model": {"uri": "s3://"}}, "a bucket's name has 3 to 63 letters", "spec.model.uri"),
    _spec("a claim in capitals", {"model": {"uri": "pvc://Models/x"}}, "a PersistentVolumeClaim's name has lower-case letters", "spec.model.uri"),
    _spec("a repository with a space", {"model": {"uri": "hf://me/my model"}}, "owner and name of a repository of the Hub", "spec.model.uri"),
    _spec("an empty part", {"model": {"uri": "s3://models//x"}}, "a path has no empty part (a//b)", "spec.model.uri"),
    _spec("a line break in a key", {"model": {"uri": "s3://models/x\n/y"}}, "no control characters", "spec.model.uri"),
    _spec("a Hub URI to write to", {"output": {"uri": "hf://me/mine"}}, "a URI begins with its scheme: s3://bucket/key or pvc://claim/path", "spec.output.uri"),
    Mistake("a name too long", {"metadata": {"name": "s" * 41}}, "use at most 40 lower-case letters"),
    _training("a learning rate in quotes", {"learningRate": "2e-4"}, 'must be of type number: "string"'),
    _training("a learning rate below nothing", {"learningRate": -1e-4}, "should be greater than or equal to 0"),
    _training("a learning rate too large", {"learningRate": 2}, "learningRate must lie between 0 and 1, for example 2e-4"),
    _training("a learning rate of nothing", {"learningRate": 0}, "learningRate must lie between 0 and 1, for example 2e-4"),
    _training("more decay than steps", {"decayRatio": 1.5}, "decayRatio is a part of all steps: at most 1"),
    _training("more warm-up than steps", {"warmupRatio": 2}, "warmupRatio is a part of all steps: at most 1"),
    _training("beta1 of 1", {"adamBeta1": 1}, "adamBeta1 must be below 1"),
    _training("beta2 of 1", {"adamBeta2": 1.0}, "adamBeta2 must be below 1"),
    _training("smoothing all away", {"labelSmoothingFactor": 1}, "labelSmoothingFactor must be below 1"),
    _training("dropping all out", {"dropout": 1}, "dropout must be below 1"),
    _spec("a password in the store's URL", {"storage": {"endpointURL": "http://me:secret@s3.storage.svc:8333"}}, "hold no user name and no password", "spec.storage.endpointURL"),
    _spec("a user in the Hub's URL", {"huggingFace": {"endpointURL": "https://me@hub.example"}}, "Put them into a Secret", "spec.huggingFace.endpointURL"),
    _spec("a password in the tracking server's URL", {"tracking": {"mlflow": {"trackingURI": "http://me:secret@mlflow:5000/path"}}}, "hold no user name and no password", "spec.tracking.mlflow.trackingURI"),
    _spec("adapters dropped out", {"method": {"lora": {"dropout": 1}}}, "dropout must be below 1", "spec.method.lora.dropout"),
    _spec("mlmProbability of 1", {"task": "MaskedLM", "maskedLM": {"mlmProbability": 1}}, "mlmProbability must lie between 0 and 1", "spec.maskedLM.mlmProbability"),
    _spec("a word always left out", {"dataset": {"augmentation": {"wordDropout": 1}}}, "a probability below 1", "spec.dataset.augmentation.wordDropout"),
    _spec("no temperature", {"method": {"distillation": {"teacherUri": "s3://models/t", "temperature": 0}}}, "temperature must be above 0", "spec.method.distillation.temperature"),
    _spec("all from the teacher and more", {"method": {"distillation": {"teacherUri": "s3://models/t", "alpha": 1.5}}}, "alpha is a part: at most 1", "spec.method.distillation.alpha"),
    _spec("settings of another method", {"method": {"type": "Full"}}, "method.lora belongs to method.type LoRA, DoRA or QLoRA", "spec.method"),
    _spec("a 4-bit base without QLoRA", {"method": {"quantizedBase": {}}}, "method.quantizedBase belongs to method.type QLoRA", "spec.method"),
    _spec("rehearsal with adapters", {"method": {"qat": {}}}, "method.qat and method.pruning change the weights themselves", "spec.method"),
    _spec("rehearsal and pruning", {"method": {"type": "Full", "lora": None, "qat": {}, "pruning": {}}}, "method.qat and method.pruning can't be had together", "spec.method"),
    _spec("two sources in one", {"dataset": {"train": {"inline": "{}"}}}, "give either uri or inline", "spec.dataset.train"),
    _spec("no source at all", {"dataset": {"eval": {"uri": None}}}, "give either uri or inline", "spec.dataset.eval"),
    _spec("characters of a Hub data set", {"dataset": {"eval": {"uri": "hf://a/b", "encoding": "Latin1"}}}, "encoding is for files", "spec.dataset.eval"),
    _spec("two held-out sets", {"dataset": {"splitPercent": 5}}, "give either dataset.eval or dataset.splitPercent", "spec.dataset"),
    _spec("a split of a stream", {"dataset": {"eval": None, "splitPercent": 5, "streaming": True}}, "dataset.splitPercent can't be had with streaming", "spec.dataset"),
    _spec("a batch smaller than the workers", {"training": {"globalBatchSize": 1}}, "every process needs an example"),
    _spec("workers that can't be shared out", {"parallelism": {"tensorParallel": 3}}, "parallelism.tensorParallel must divide workers.replicas"),
    _spec("layers shared across workers", {"workers": {"processesPerWorker": 3}, "parallelism": {"tensorParallel": 2}}, "parallelism.tensorParallel must divide the training processes of a worker"),
    _spec("shares within a worker of one process", {"parallelism": {"strategy": "HSDP"}}, "parallelism.strategy HSDP shares a model out over the training processes of a worker"),
    _spec("processes without a GPU", {"workers": {"gpusPerWorker": 4, "processesPerWorker": 2}}, "each GPU has a training process", "spec.workers"),
    _spec("a budget of nothing", {"budget": {"maxGpuSeconds": 60}}, "budget.maxGpuSeconds counts GPUs, and this job asks for none"),
    _spec("children that outlive their job", {"ttlSecondsAfterFinished": 60, "childrenTTLSecondsAfterFinished": 61}, "childrenTTLSecondsAfterFinished must not be longer than ttlSecondsAfterFinished"),
    _spec("pods in a queue", {"workers": {"podTemplate": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}}}, "belongs to the FineTuneJob itself (metadata.labels)", "spec"),
    _spec("classes for a chat", {"classification": {}}, "classification belongs to the classification tasks"),
    _spec("numbers for tokens", {"task": "TokenClassification", "classification": {"problemType": "Regression"}}, "classification.problemType MultiLabel and Regression belong to task SequenceClassification"),
    _spec("preferences for a chat", {"preference": {}}, "preference belongs to task DPO"),
    _spec("languages for a chat", {"translation": {"sourceLanguage": "en", "targetLanguage": "de"}}, "translation belongs to task Seq2Seq"),
    _spec("masks for a chat", {"maskedLM": {}}, "maskedLM belongs to task MaskedLM"),
    _spec("a chat from nothing", {"model": {"init": "Random"}, "method": {"type": "Full", "lora": None}}, "model.init Random is pre-training: it needs task CausalLM or MaskedLM"),
    _spec("adapters from nothing", {"model": {"init": "Random"}, "task": "CausalLM"}, "model.init Random trains all weights"),
    _spec("a teacher of preferences", {"task": "DPO", "method": {"distillation": {"teacherUri": "s3://models/t"}}}, "method.distillation needs a task with classes or tokens to predict"),
    _spec("a stream without an end", {"dataset": {"streaming": True}, "training": {"maxSteps": None}}, "dataset.streaming doesn't know how long the data is: set training.maxSteps"),
    _spec("stopping without looking", {"training": {"earlyStopping": {}}}, "training.earlyStopping looks at evaluations: set training.evalSteps"),
    _spec("looking at nothing", {"dataset": {"eval": None}, "training": {"evalSteps": 5}}, "training.evalSteps needs held-out data"),
    _spec("one folder for two things", {"checkpoint": {"uri": "s3://models/sentiment"}}, "checkpoint.uri and output.uri must be different folders"),
    _spec("writing over the model", {"output": {"uri": "s3://models/smollm2-135m-instruct"}}, "the model to start from would be overwritten"),
]  # fmt: skip

MISTAKES = SHAPES + RULES
