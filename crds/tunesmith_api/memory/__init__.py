"""How much memory training takes, by arithmetic on a model's config.json and the headers of its files.

The trainer logs it and chooses how to share the model out by it; `tunesmith plan` shows it before a pod is started.
No weights are read, and nothing here opens a file.
"""
