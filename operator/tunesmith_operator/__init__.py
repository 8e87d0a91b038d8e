"""The operator: turns FineTuneJobs and ModelDeployments into Kubernetes objects and reports what becomes of them.

Four floors, each importing only those below it: shell (kopf) over engine (asyncio) over adapters (Kubernetes, HTTP)
over core (pure functions).
"""
