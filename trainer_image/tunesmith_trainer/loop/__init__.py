"""One rank's run from top to bottom. `run.TrainingRun` is the way in; `group.worker` makes it."""
