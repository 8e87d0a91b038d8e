"""`tunesmith`: the command line. `tunesmith run` takes a FineTuneJob through the trainer on this machine.

It knows the API types and the operator's pure core, and starts the trainer as a child process: neither the trainer's
code nor anything of Kubernetes is imported here.
"""
