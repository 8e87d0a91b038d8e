"""The trainer: what runs in the worker pods of a FineTuneJob.

`pod.supervisor` is the first process of every pod; on pod 0 it starts `group.driver`, which has Ray Train run `loop` on
every pod.
"""
