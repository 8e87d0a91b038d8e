"""What every trainer pod runs, whatever it trains: its first process, Ray's processes, progress, the pod's own limits.

Entered by `python -m tunesmith_trainer`. No torch: these modules are up long before anything heavy is imported.
"""
