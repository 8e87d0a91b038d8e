"""Ray's side of a run: the driver on pod 0, one worker per rank, and the hand-over to the processes that train.

`pod.supervisor` starts its processes by name. Nothing below knows of it.
"""
