"""`tunesmith`: the command line. `run` trains a FineTuneJob on this machine, `plan` says what it takes in a cluster.

It knows the API types and the operator's pure core, and starts the trainer as a child process: neither the trainer's
code nor anything of Kubernetes is imported here.
"""
