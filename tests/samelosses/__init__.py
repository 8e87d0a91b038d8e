"""Does a change leave the trainer's numbers as they are, to the last bit? `python -m samelosses BASE [HEAD]` runs both commits.

`__main__` runs each commit's own tests of every task and method in a worktree of its own, `recorder` writes down what
they leave in the object store, `compare` sets the two side by side.
"""
