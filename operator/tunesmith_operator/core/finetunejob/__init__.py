"""What a FineTuneJob needs: policies → plan → children → status, put together by `decide`."""
