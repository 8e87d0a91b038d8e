"""`tunesmith plan`: what a FineTuneJob would take and make in a cluster, said before anything is started there."""
