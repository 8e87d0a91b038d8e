"""ChatSFT of a vision-language model: conversations whose messages hold images (LLaVA, SmolVLM, Qwen-VL and others).

The model's own processor says how many tokens an image becomes and lays it out. Images are stored as the files that
they came in, and made into pixels when a batch is made: a large photograph's pixels can be a hundred times its bytes.

Every batch holds an image: to one that has none, a line with an image and nothing to learn is added. So all ranks
compute gradients of the same parameters, whatever rows they happen to have, and none waits for another's.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import padding_id
from tunesmith_trainer.tasks.base import IGNORE, BadRow, Example, Row
from tunesmith_trainer.tasks.causal_lm import ChatSFT, keeps_logits
from tunesmith_trainer.tasks.chat import Rendering, TemplateError, renderings, spoken_runs
from tunesmith_trainer.tasks.collator import length_mask, pad, pad_rows
from tunesmith_trainer.tasks.conversations import Message, read_parts, template_arguments
from tunesmith_trainer.tasks.fields import shorten
from tunesmith_trainer.tasks.image_inputs import decoded, each, from_bytes, image_bytes, lossless

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

__all__ = ["VisionChat"]

TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")
"""What a processor may say of each token beside its number."""
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", *TOKEN_KINDS})
_NO_GOOD = "spec.model.uri: the model's processor can't be used"


@dataclass(frozen=True)
class _Template:
    """A processor as `renderings` wants a tokenizer."""

    processor: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor.tokenizer, name)

    def apply_chat_template(self, messages: Sequence[Any], **arguments: Any) -> str:
        return str(self.processor.apply_chat_template(messages, **arguments))


class VisionChat(ChatSFT):
    """Conversations with images; the loss counts what the assistant says and the token that ends its turn."""

    # how positions and attention of images go, each architecture knows for itself
    supports_packing = False
    pipeline_tag = "image-text-to-text"

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self._arguments: frozenset[str] | None = None
        self._image_example: Example | None = None

    # ---- rows

    def normalized(self, row: Row) -> Row:
        row = super().normalized(row)
        columns = self.plan.dataset.columns
        parts = sum(part["type"] == "image" for message in self._messages(row) for part in message["content"])
        images = self._files(row)
        if parts != len(images):
            raise BadRow(
                f"has {parts} image part(s) in {columns.messages!r} but {len(images)} image(s) in {columns.images!r}; "
                'each image needs one part {"type": "image"}, in the same order (spec.dataset.columns.images)'
            )
        return row

    def _read_message(self, message: Any, where: str) -> Message:
        found = read_parts(message, where, _checked_parts)
        if found["role"] == "assistant" and not isinstance(found["content"], str):
            for place, part in enumerate(found["content"], 1):
                if part["type"] == "image":
                    raise BadRow(f"{where}, part {place} is an image of the assistant's, who can only write")
        return found

    def _messages(self, row: Row) -> list[dict[str, Any]]:
        """Return the messages in the one form that processors' templates read: a list of parts each."""
        column = self.plan.dataset.columns.messages
        return [{**message, "content": _parts(message["content"])} for message in row[column]]

    def _files(self, row: Row) -> list[bytes]:
        column = self.plan.dataset.columns.images
        value = row.get(column)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, Sequence):
            raise BadRow(f"field {column!r} must be a list of images (base64 text, or paths)")
        return [image_bytes(item, f"field {column!r}: image {number}") for number, item in enumerate(values, 1)]

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """The user's texts, as `messages.N.P`: part P of message N."""
        return {
            f"messages.{number}.{place}": part["text"]
            for number, message in enumerate(self._messages(row))
            if message["role"] == "user"
            for place, part in enumerate(message["content"])
            if part["type"] == "text"
        }

    def with_texts(self, row: Row, texts: Mapping[str, str]) -> Row:
        messages = self._messages(row)
        for number, message in enumerate(messages):
            message["content"] = [
                {**part, "text": texts.get(f"messages.{number}.{place}", part["text"])} if "text" in part else part
                for place, part in enumerate(message["content"])
            ]
        return {**row, self.plan.dataset.columns.messages: messages}

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoProcessor

        from tunesmith_trainer.tasks.video_processor import without_videos

        try:
            # Pillow's arithmetic, whether torchvision is there or not: results don't depend on what is installed
            with without_videos():
                processor = AutoProcessor.from_pretrained(
                    folder, backend="pil", local_files_only=True, trust_remote_code=False
                )
            if not hasattr(processor, "image_processor"):
                raise ValueError("it has none for images (preprocessor_config.json or processor_config.json)")
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD}: {error}") from error
        if not processor.chat_template:
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD}: it has no chat template; add chat_template.jinja")
        self.processor = processor
        self._image_example = self._try_out()
        return processor

    def _try_out(self) -> Example:
        """Encode a conversation about a grey square, and make sure that a batch's images come out as they should.

        Raises:
            UserError: the processor does with images what its image processor alone doesn't.
        """
        import torch
        from PIL import Image as Images

        grey = Images.new("RGB", (32, 32), (127, 127, 127))
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "."}]}
        try:
            (rendering,) = renderings(_Template(self.processor), [question, answer])
            out = self.processor(text=[rendering.text], images=[[grey]], return_tensors="pt")
            pixels = self._pixels([[grey]])
            for name in set(out) - TEXT_INPUTS:
                if name not in pixels or not torch.equal(torch.as_tensor(out[name]), torch.as_tensor(pixels[name])):
                    raise ValueError(f"it makes {name} otherwise than its image processor alone")
            example, _ = self._tokenized(rendering, [grey])
        except Exception as error:  # whatever a processor of another kind raises
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD} for images: {error}") from error
        return _with_files(example, [lossless(grey)])

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        from tunesmith_trainer.models.loading import load_pretrained

        model = load_pretrained(AutoModelForImageTextToText, folder, **options)
        self._keep = keeps_logits(model)
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        return model

    def freeze_reference(self, model: nn.Module, is_shared: bool = False) -> None:
        """Freeze what no loss reaches: DistributedDataParallel would wait for its gradient for ever.

        Many models read their vision tower before its end (LLaVA leaves out the last layer). What is reached is not
        looked up but tried out, with a grey square.
        """
        import torch

        from tunesmith_trainer.models.numerics import Numerics

        assert self._image_example is not None
        device = next(model.parameters()).device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        numerics = Numerics.choose(self.plan.training.precision, self.plan.gpus_per_worker)
        with torch.random.fork_rng(), numerics.autocast() or nullcontext():
            loss = self.loss(model, self.collate([self._image_example], device, packed=False))
        for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            parameter.requires_grad_(gradient is not None)

    # ---- tokens

    def encode(self, row: Row) -> list[Example]:
        column = self.plan.dataset.columns.images
        files = self._files(row)
        images = [decoded(data, f"field {column!r}: image {number}") for number, data in enumerate(files, 1)]
        messages = self._messages(row)
        try:
            arguments = template_arguments(row, self.plan.dataset.columns)
            found = renderings(_Template(self.processor), messages, arguments)
            return [self._example(messages, rendering, images, files) for rendering in found]
        except BadRow:
            raise
        except TemplateError as error:
            raise BadRow(f"can't be used: {error}") from error
        except ValueError as error:
            raise BadRow(f"can't be used: the model's processor refuses it: {error}") from error

    def _example(
        self, messages: Sequence[Message], rendering: Rendering, images: Sequence[Image], files: Sequence[bytes]
    ) -> Example:
        """Encode one rendering, with the images of as many messages as it holds."""
        held = sum(part["type"] == "image" for message in messages[: rendering.messages] for part in message["content"])
        example, needed = self._tokenized(rendering, images[:held])
        cut = self._cut(example, needed)
        turns = spoken_runs(cut.features["labels"])
        noted = replace(cut, turns=turns, unlearned_turns=len(rendering.spans) - turns, notes=rendering.notes)
        return _with_files(noted, files[:held])

    def _tokenized(self, rendering: Rendering, images: Sequence[Image]) -> tuple[Example, int]:
        """Tokenize a rendered conversation, images laid out as tokens, and label what lies in the spans.

        Returns:
            The example, and up to which token a cut would go through an image.
        """
        first = self.processor.tokenizer.bos_token
        text = rendering.text
        out = self.processor(
            text=[text],
            images=[list(images)] if images else None,
            # where the template hasn't put the first token in, the tokenizer does, as in apply_chat_template
            add_special_tokens=not (first and text.startswith(first)),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        if images and "text_replacement_offsets" not in out:
            raise ValueError("it doesn't say where in the text images are laid out")
        laid_out = out["text_replacement_offsets"][0] if images else []
        ends = [one["span"][1] for one in laid_out]
        gained = [0, *(one["new_span"][1] - one["span"][1] for one in laid_out)]
        moved = [tuple(place + gained[bisect_right(ends, place)] for place in span) for span in rendering.spans]
        ids, offsets = list(out["input_ids"][0]), out["offset_mapping"][0]
        labels = [
            token if any(start < high and end > low and end > start for low, high in moved) else IGNORE
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        behind = laid_out[-1]["new_span"][1] if laid_out else 0
        features = {
            "input_ids": ids,
            "labels": labels,
            **{name: list(out[name][0]) for name in TOKEN_KINDS if name in out},
        }
        example = Example(features, len(ids), float(sum(label != IGNORE for label in labels[1:])))
        return example, sum(start < behind for start, _ in offsets)

    def _cut(self, example: Example, needed: int) -> Example:
        longest = self.plan.training.max_length
        if example.length <= longest:
            return example
        if needed >= longest:
            raise BadRow(
                f"takes {needed} tokens up to its last image, which spec.training.maxLength {longest} doesn't hold; "
                "raise it, or give smaller or fewer images"
            )
        cut = {name: values[:longest] for name, values in example.features.items()}
        learned = sum(label != IGNORE for label in cut["labels"][1:])
        return Example(cut, longest, float(learned), truncated=True)

    # ---- batches

    def _padded(
        self, examples: Sequence[Example], device: torch.device
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        import torch

        lines = list(examples)
        if not any(len(example.features["file_sizes"]) for example in lines):
            assert self._image_example is not None
            silent = {**self._image_example.features, "labels": [IGNORE] * self._image_example.length}
            lines.append(replace(self._image_example, features=silent))
        tokenizer = self.processor.tokenizer
        labels = pad_rows([self._next_labels(example) for example in lines], IGNORE, device)
        inputs = {
            "input_ids": pad(lines, "input_ids", padding_id(tokenizer), device),
            "attention_mask": length_mask([len(example.features["input_ids"]) for example in lines], device),
        }
        for name in TOKEN_KINDS:
            if any(name in example.features for example in lines):
                kinds = [example.features.get(name, [0] * example.length) for example in lines]
                inputs[name] = pad_rows(kinds, 0, device)
        files = [(number, data) for number, example in enumerate(lines) for data in _files_of(example)]
        images: list[list[Image]] = [[] for _ in lines]
        for (number, _), image in zip(files, each(_stored, files), strict=True):
            images[number].append(image)
        inputs |= {name: torch.as_tensor(value).to(device) for name, value in self._pixels(images).items()}
        if self._arguments is not None:
            inputs = {name: value for name, value in inputs.items() if name in self._arguments}
        owner = torch.arange(len(lines), device=device)[:, None].expand(labels.shape).flatten()
        return inputs, labels.flatten(), owner

    def _pixels(self, images: Sequence[Sequence[Image]]) -> Mapping[str, Any]:
        """Make the model's image inputs of each line's images."""
        found: Mapping[str, Any] = self.processor.image_processor(images=images, return_tensors="pt")
        return found


def _checked_parts(content: Any, where: str) -> Any:
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise BadRow(f"{where} needs as 'content' a text or a list of parts")
    for place, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in {"text", "image"}:
            raise BadRow(
                f"{where}, part {place} has type {shorten(str(kind))!r}; use {{type: text}} or {{type: image}}"
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise BadRow(f"{where}, part {place} needs a text 'text'")
    return content


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    # nothing but these: rows of Parquet files have every key in every part, and templates look at which there are
    return [
        {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in content
    ]


def _with_files(example: Example, files: Sequence[bytes]) -> Example:
    stored = {"files": from_bytes(b"".join(files)), "file_sizes": [len(data) for data in files]}
    return replace(example, features={**example.features, **stored})


def _files_of(example: Example) -> list[bytes]:
    data, start, files = example.features["files"].tobytes(), 0, []
    for size in example.features["file_sizes"]:
        files.append(data[start : start + size])
        start += size
    return files


def _stored(file: tuple[int, bytes]) -> Image:
    return decoded(file[1], "a stored image")
