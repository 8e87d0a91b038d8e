"""Makes nothing, and says that the revision's files are there."""

import json
import os
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

plan = json.loads(Path(os.environ[keys.ENV_PLAN]).read_text())
model = ModelRef(uri=plan["artifactUri"], digest="a" * 64, size_bytes=1)
report = TerminationReport(outcome=Outcome.SUCCEEDED, reason=keys.Reason.QUANTIZED, model=model)
Path(os.environ[keys.ENV_TERMINATION_LOG]).write_text(report.to_bounded_json())
