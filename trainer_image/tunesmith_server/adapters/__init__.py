"""LoRA adapters of the served model: checked and converted once by a Job (`__main__`), fetched by servers (`served`)."""
