"""What a ModelDeployment needs: policies → revisions → children → status, put together by `decide`."""
