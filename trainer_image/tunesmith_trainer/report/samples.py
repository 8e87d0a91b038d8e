"""What the model answers to a few held-out prompts, before and after training. Called by `finish`.

Only tasks that generate have answers: ChatSFT, CausalLM, Seq2Seq and DPO. Decoding is greedy (or by the beams of
`spec.generation`), so that before and after differ by the training alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer.report.record import Sample
from tunesmith_trainer.tasks.base import IGNORE, Example, Row, Task
from tunesmith_trainer.tasks.conversations import template_arguments
from tunesmith_trainer.tasks.preference_pairs import read_pair
from tunesmith_trainer.tasks.vision_chat import TEXT_INPUTS

if TYPE_CHECKING:
    from torch import nn

    from tunesmith_trainer.distributed.collectives import Group

__all__ = ["MOST_SAMPLES", "sample", "samples"]

MOST_SAMPLES = 4
MOST_NEW_TOKENS = 128
BUDGET_SECONDS = 60.0
PROMPT_TOKENS = 32
"""How much of a plain text is given, at most half of it."""
PROBE_TOKENS = 2


@dataclass(frozen=True)
class _Prompt:
    shown: str
    expected: str
    ids: Sequence[int]
    example: Example | None = None
    """With images: what the task makes the model's inputs from."""


def sample(
    model: nn.Module,
    task: Task,
    rows: Sequence[Row],
    *,
    budget_seconds: float = BUDGET_SECONDS,
    group: Group | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Answer the prompts of the first MOST_SAMPLES rows.

    An error is logged and ends it: a report without samples is no reason to lose a run.

    Args:
        model: the model, not wrapped by DDP. Its mode stays as it is.
        task: a task whose processor is loaded. Where it generates nothing, there are no answers.
        rows: held-out rows, as they were read.
        budget_seconds: time for all answers.
        group: the ranks that share out the model's layers (FSDP, tensor parallel), if any do. All of them have to call
            this with the same rows, and stay together: where time is short, the answers are, instead of fewer.
        log: takes lines for people.

    Returns:
        Answers in the order of the rows; fewer where time ran out.
    """
    import torch

    answers: list[str] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            prompts = _prompts(task, rows)
            most, deadline = MOST_NEW_TOKENS, time.monotonic() + budget_seconds
            if group is not None and prompts:
                most, deadline = _affordable_tokens(model, task, prompts, budget_seconds, group), math.inf
            for prompt in prompts:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                answers.append(_answer(model, task, prompt, most, left))
    except Exception as error:  # whatever a model's own code or template makes of generation
        log(f"warning: the report has {len(answers)} samples: {error}")
    finally:
        model.train(was_training)
    return answers


def _affordable_tokens(
    model: nn.Module, task: Task, prompts: Sequence[_Prompt], budget_seconds: float, group: Group
) -> int:
    """Return how many tokens each answer may have, the same on all ranks, from the time that the first few take."""
    for _ in range(2):  # the first time, things are made that stay
        began = time.monotonic()
        _answer(model, task, prompts[0], PROBE_TOKENS, math.inf)
        seconds = time.monotonic() - began
    per_token = group.max([seconds])[0] / PROBE_TOKENS
    return max(1, min(MOST_NEW_TOKENS, int(budget_seconds / len(prompts) / per_token)))


def samples(task: Task, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> tuple[Sample, ...]:
    """Put what `sample` answered for the same rows beside prompts and expected answers."""
    if not before and not after:
        return ()
    prompts = _prompts(task, rows)[: max(len(before), len(after))]
    return tuple(
        Sample(prompt=prompt.shown, expected=prompt.expected, before=old, after=new)
        for prompt, old, new in zip_longest(prompts, before, after)
        if prompt is not None
    )


def _answer(model: nn.Module, task: Task, prompt: _Prompt, most_tokens: int, seconds: float) -> str:
    import torch
    from torch.distributed.fsdp import FSDPModule

    tokenizer, generation = _tokenizer(task), task.plan.generation
    device = next(model.parameters()).device
    if prompt.example is None:
        ids = torch.tensor([list(prompt.ids)], device=device)
        inputs: Mapping[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = task.collate([prompt.example], device, packed=False).inputs
    generate = getattr(model, "generate")  # noqa: B009 - nn.Module's own type hides it
    produced = generate(
        **inputs,
        max_new_tokens=min(generation.max_new_tokens, most_tokens),
        num_beams=generation.num_beams,
        do_sample=False,
        use_cache=True,
        max_time=seconds,
        eos_token_id=_ends(model, tokenizer) or None,
        pad_token_id=_padding(tokenizer),
        # ranks that share out a model have to run it equally often
        synced_gpus=isinstance(model, FSDPModule),
    )[0]
    answer = produced if task.plan.task is TaskName.SEQ2SEQ else produced[len(prompt.ids) :]
    return str(tokenizer.decode(answer.tolist(), skip_special_tokens=True)).strip()


def _tokenizer(task: Task) -> Any:
    return getattr(task.processor, "tokenizer", task.processor)


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's, and ChatML's end of a turn."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends.append(tokenizer.eos_token_id)
    if "<|im_end|>" in tokenizer.get_vocab():
        ends.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return sorted({int(end) for end in ends if end is not None})


def _prompts(task: Task, rows: Sequence[Row]) -> list[_Prompt]:
    kinds = {
        TaskName.CHAT_SFT: _chat_prompt,
        TaskName.CAUSAL_LM: _text_prompt,
        TaskName.SEQ2SEQ: _source_prompt,
        TaskName.DPO: _question_prompt,
    }
    make = kinds.get(task.plan.task)
    found = (make(task, row) for row in rows[:MOST_SAMPLES]) if make else ()
    return [prompt for prompt in found if prompt is not None]


def _chat_prompt(task: Task, row: Row) -> _Prompt | None:
    """The conversation up to the assistant's last turn."""
    messages = row[task.plan.dataset.columns.messages]
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return None
    before, answer = messages[: turns[-1]], _text(messages[turns[-1]]["content"])
    if hasattr(task.processor, "image_processor"):
        return _seen_prompt(task, row, "\n".join(map(_turn, before)), answer)
    return _conversation(task, before, answer, template_arguments(row, task.plan.dataset.columns))


def _seen_prompt(task: Task, row: Row, shown: str, expected: str) -> _Prompt | None:
    """A conversation with images, as the task encodes it, cut before the last answer; None where that isn't whole."""
    example = task.encode(row)[-1]  # where turns are examples of their own, the last one
    learned = [place for place, label in enumerate(example.features["labels"]) if label != IGNORE]
    if example.truncated or not learned or not example.features["file_sizes"]:
        return None
    start = learned[-1]
    while start - 1 in learned:
        start -= 1
    per_token = {"labels", *TEXT_INPUTS} & set(example.features)
    cut = {name: example.features[name][:start] for name in per_token}
    ids = cut["input_ids"]
    return _Prompt(shown, expected, ids, replace(example, features={**example.features, **cut}, length=start))


def _turn(message: Mapping[str, Any]) -> str:
    return f"{message['role']}: {_text(message['content'])}"


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else "[image]" for part in content)


def _question_prompt(task: Task, row: Row) -> _Prompt | None:
    """The prompt of a preference; the better answer is the expected one."""
    pair = read_pair(row, task.plan.dataset.columns)
    expected = pair.chosen if isinstance(pair.chosen, str) else pair.chosen[0]["content"]
    if not isinstance(pair.prompt, str):
        return _conversation(task, pair.prompt, expected) if pair.prompt else None
    if pair.templated and task.processor.chat_template:  # as it is encoded for training
        return _conversation(task, [{"role": "user", "content": pair.prompt}], expected)
    return _Prompt(pair.prompt, expected, _ids(task, task.processor(pair.prompt, verbose=False)["input_ids"]))


def _conversation(
    task: Task,
    messages: Sequence[Mapping[str, Any]],
    expected: str,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> _Prompt:
    found = task.processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, **arguments
    )
    return _Prompt("\n".join(map(_turn, messages)), expected, _ids(task, found["input_ids"]))


def _text_prompt(task: Task, row: Row) -> _Prompt | None:
    """The beginning of a plain text; what follows is expected."""
    ids = list(task.processor(row[task.plan.dataset.columns.text], verbose=False)["input_ids"])
    if len(ids) < 4:
        return None
    given = min(PROMPT_TOKENS, len(ids) // 2)
    end = given + min(task.plan.generation.max_new_tokens, MOST_NEW_TOKENS)
    read = task.processor.decode
    return _Prompt(
        read(ids[:given], skip_special_tokens=True), read(ids[given:end], skip_special_tokens=True), ids[:given]
    )


def _source_prompt(task: Task, row: Row) -> _Prompt | None:
    columns = task.plan.dataset.columns
    source = str(row[columns.source])
    ids = task.processor(source, verbose=False)["input_ids"]
    return _Prompt(source, str(row[columns.target]), _ids(task, ids))


def _ids(task: Task, ids: Sequence[int]) -> list[int]:
    """Cut from the left what is longer than maxLength: the end is what is to be answered."""
    return list(ids)[-task.plan.training.max_length :]
