"""LoRA adapters of the served model: checked and converted once by a Job, fetched by servers."""
