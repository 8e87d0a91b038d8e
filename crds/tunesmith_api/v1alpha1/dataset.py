"""What a model learns from: files, columns, cleaning, splitting and augmentation."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from tunesmith_api.model import NonNegative, SpecModel, Uri, cel

__all__ = [
    "Augmentation",
    "BackTranslation",
    "Columns",
    "DataFormat",
    "Dataset",
    "DatasetSource",
    "Deduplication",
    "Encoding",
    "OnBadRow",
]

ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class DataFormat(StrEnum):
    """How rows are written."""

    AUTO = "Auto"
    JSONL = "JSONL"
    CSV = "CSV"
    PARQUET = "Parquet"
    TEXT = "Text"


class Encoding(StrEnum):
    """How the characters of a text file are written."""

    AUTO = "Auto"
    LATIN1 = "Latin1"


class OnBadRow(StrEnum):
    """What a row that can't be used does to the job."""

    FAIL = "Fail"
    SKIP = "Skip"


class Deduplication(StrEnum):
    """Which rows count as the same."""

    NONE = "None"
    EXACT = "Exact"


def _probability(description: str) -> Any:
    rule = cel("self < 1.0", "a probability below 1, for example 0.1")
    return Field(default=0.0, description=description, json_schema_extra={"x-kubernetes-validations": [rule]})


class DatasetSource(SpecModel):
    """Examples: one file, a folder of files, a Hub data set, or rows in the manifest itself."""

    uri: Uri | None = Field(
        default=None,
        description="A file, or a folder whose files are read in order of their names: s3://bucket/key, pvc://claim/path, or hf://owner/name of a Hub data set.",
    )
    inline: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        default=None, description="The rows themselves, as JSON Lines: for a first try. At most 8 KiB."
    )
    format: DataFormat = Field(
        default=DataFormat.AUTO,
        description="How rows are written; Auto goes by the file's extension (.jsonl, .json, .csv, .tsv, .txt, also with .gz, .bz2, .xz or .zst behind it; .parquet, .arrow).",
    )
    encoding: Encoding = Field(
        default=Encoding.AUTO,
        description="How the characters of text files are written. Auto is UTF-8, or UTF-16 where the file begins with its mark; Latin1 is Latin-1 or Windows-1252.",
    )
    config: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Configuration of a Hub data set that has several."
    )
    split: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default="train", description="Split of a Hub data set, for example train or validation."
    )
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None,
        description="Commit, tag or branch of a Hub data set; name a commit for a run that can be repeated.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "has(self.uri) != has(self.inline)",
                    "give either uri or inline: the place of the data or the rows themselves",
                ),
                cel(
                    "!has(self.encoding) || self.encoding == 'Auto' || (has(self.uri) && !self.uri.startsWith('hf://'))",
                    "encoding is for files at s3:// or pvc://",
                ),
            ]
        },
    )

    @property
    def name(self) -> str:
        """How messages call it: its URI, or `inline`."""
        return self.uri or "inline"


class Columns(SpecModel):
    """Which field of a row holds what. A task reads only its own."""

    messages: ColumnName = Field(
        default="messages",
        description="ChatSFT: field with the list of {role, content} messages. Rows of other known forms (ShareGPT's conversations, Alpaca's instruction and output, prompt and completion) need none.",
    )
    tools: ColumnName = Field(
        default="tools",
        description="ChatSFT: field with the tools that a conversation may call (a list, or one as JSON text), shown by the chat template.",
    )
    chat_template_kwargs: ColumnName = Field(
        default="chat_template_kwargs",
        description="ChatSFT: field with settings of a conversation for the chat template, for example {enable_thinking: false}.",
    )
    images: ColumnName = Field(
        default="images",
        description="ChatSFT on a model that sees: field with the images (base64 text, or paths below the data file's folder) that {type: image} parts refer to, in order.",
    )
    text: ColumnName = Field(
        default="text", description="CausalLM, MaskedLM, SequenceClassification: field with the text."
    )
    text_pair: ColumnName | None = Field(
        default=None, description="SequenceClassification of two texts: field with the second."
    )
    label: ColumnName = Field(
        default="label",
        description="SequenceClassification, ImageClassification: field with the class (name or number), the list of classes, or the number to predict.",
    )
    tokens: ColumnName = Field(default="tokens", description="TokenClassification: field with the list of words.")
    tags: ColumnName = Field(default="tags", description="TokenClassification: field with the list of their tags.")
    source: ColumnName = Field(default="source", description="Seq2Seq: field with the input text.")
    target: ColumnName = Field(default="target", description="Seq2Seq: field with the text to produce.")
    prompt: ColumnName = Field(
        default="prompt", description="DPO, Reward: field with the question, a text or a list of messages."
    )
    chosen: ColumnName = Field(default="chosen", description="DPO, Reward: field with the better answer.")
    rejected: ColumnName = Field(default="rejected", description="DPO, Reward: field with the worse answer.")
    image: ColumnName = Field(
        default="image",
        description="ImageClassification: field with the image (base64 text, or a path below the data file's folder).",
    )


class BackTranslation(SpecModel):
    """Two translation models that paraphrase a text by way of another language."""

    probability: NonNegative = _probability("Part of the training texts that are paraphrased.")
    forward_uri: Uri = Field(
        description="Seq2Seq model from the data's language to another, for example hf://Helsinki-NLP/opus-mt-en-de."
    )
    backward_uri: Uri = Field(description="Seq2Seq model back again.")


class Augmentation(SpecModel):
    """Changes to training texts, drawn anew in each epoch from the job's seed. Held-out texts are left alone."""

    word_dropout: NonNegative = _probability("Chance of each word to be left out (Wei & Zou, 2019: EDA).")
    word_swap: NonNegative = _probability("Chance of each word to change places with its neighbour.")
    synonym_replacement: NonNegative = _probability(
        "Chance of each word to be replaced by a synonym from WordNet (English)."
    )
    back_translation: BackTranslation | None = Field(
        default=None, description="Paraphrase by translation there and back, once before training starts."
    )


class Dataset(SpecModel):
    """What the model learns from."""

    train: DatasetSource = Field(description="Examples to train on.")
    eval: DatasetSource | None = Field(
        default=None,
        description="Held-out examples: evaluated before the first step, every `training.evalSteps` and at the end.",
    )
    split_percent: int | None = Field(
        default=None,
        ge=1,
        le=50,
        description="Instead of `eval`: hold out so many percent of `train`, chosen by each row's content, so that a row stays on its side when the data grows.",
    )
    columns: Columns = Field(default_factory=Columns, description="Names of the fields in a row.")
    on_bad_row: OnBadRow = Field(
        default=OnBadRow.FAIL,
        description="Fail ends the job at the first row that can't be used; Skip leaves it out, counts it in status.dataset and names the first.",
    )
    deduplication: Deduplication = Field(
        default=Deduplication.NONE,
        description="Exact leaves out training rows that repeat an earlier one, and those that stand in the held-out data too.",
    )
    streaming: bool = Field(
        default=False,
        description="True reads and tokenizes while training instead of before it: for data larger than a worker's disk. Needs training.maxSteps.",
    )
    shuffle_buffer_size: int = Field(
        default=10_000, ge=1, le=10_000_000, description="With streaming: rows among which the next one is drawn."
    )
    augmentation: Augmentation | None = Field(default=None, description="Changes to training texts.")
    cache_uri: Uri | None = Field(
        default=None,
        description="Folder for tokenized data, shared by jobs that read the same data with the same model; leave it out for one below checkpoint.uri.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("!(has(self.eval) && has(self.splitPercent))", "give either dataset.eval or dataset.splitPercent"),
                cel(
                    "!(self.streaming && has(self.splitPercent))",
                    "dataset.splitPercent can't be had with streaming: give dataset.eval",
                ),
            ]
        },
    )

    @property
    def is_evaluated(self) -> bool:
        """Whether there is held-out data."""
        return self.eval is not None or self.split_percent is not None
